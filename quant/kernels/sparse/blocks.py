"""Attend block-sparsely in plain torch: choose blocks of keys, attend to them, measure them.

Blocks are runs of `block` tokens; the last one may be shorter. For each head and each block of
queries, blocks of keys are chosen by the means of their tokens, as SpargeAttn does (arXiv
2502.18137): the softmax over the means estimates what each block of keys holds, and the fewest
blocks are kept that hold the wanted share together. Attention is then exact on the tokens of the
kept blocks. Here it is emulated: scores are computed and masked, so nothing is saved. The kernel
that computes no others is `quant.kernels.sparse.triton_attention`.

B is the batch, S the tokens, M the blocks, D the width of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_SCORES = 1 << 26
"""Scores that emulated attention holds at a time.

A float32 tensor of them takes a quarter of a GiB, and a few such tensors exist at once."""

MAX_SHARES = 1 << 24
"""Shares of blocks that `choose_blocks` sorts at a time: half a GiB with their order and sums."""

SAMPLED_QUERIES = 16
"""Queries, evenly spaced over the tokens, whose softmax `sample_mass` computes in full."""


def choose_blocks(q: Tensor, k: Tensor, block: int, share_of_mass: float) -> Tensor:
    """Choose which blocks of keys each block of queries attends to.

    At least one is kept. At a share of 1 all are, also those whose share rounds to nothing. Some
    heads are looked at at a time, so that the memory this takes is bounded.

    Args:
        q, k: [B, S, heads, D], rotated.

    Returns:
        [B, heads, M, M] bool: of each block of queries, the kept blocks of keys.
    """
    sizes = block_sizes(q.shape[1], block, q.device)
    at_once = max(1, MAX_SHARES // (len(q) * len(sizes) ** 2))
    queries, keys = (torch.split(_means(each, block), at_once, 1) for each in (q, k))
    parts = zip(queries, keys, strict=True)
    return torch.cat([_choose(*part, sizes, share_of_mass) for part in parts], dim=1)


def _choose(queries: Tensor, keys: Tensor, sizes: Tensor, share_of_mass: float) -> Tensor:
    """Choose by means of blocks, both [B, heads, M, D]."""
    scores = queries @ keys.transpose(-1, -2) * queries.shape[-1] ** -0.5
    # A shorter block holds less of the softmax at the same mean.
    shares, order = (scores + sizes.log()).softmax(-1).sort(dim=-1, descending=True)
    before = F.pad(shares.cumsum(-1)[..., :-1], (1, 0))
    kept = (before < share_of_mass) | (share_of_mass == 1)
    return torch.zeros_like(kept).scatter(-1, order, kept)


def attend_blocks(
    q: Tensor, k: Tensor, v: Tensor, kept: Tensor, block: int, max_scores: int = MAX_SCORES
) -> Tensor:
    """Attend q [B, S, heads, D] to the kept blocks of k and v [B, S, heads, D]: → [B, S, heads, D].

    Args:
        kept: [B, heads, M, M] bool, from `choose_blocks`.
        max_scores: number of scores held at a time; queries are processed in chunks for it.
    """
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    block_of = torch.arange(q.shape[2], device=q.device) // block
    at_once = max(1, max_scores // k[..., 0].numel())
    chunks = [
        F.scaled_dot_product_attention(queries, k, v, attn_mask=kept[:, :, rows][..., block_of])
        for queries, rows in zip(
            torch.split(q, at_once, 2), torch.split(block_of, at_once), strict=True
        )
    ]
    return torch.cat(chunks, dim=2).transpose(1, 2)


def density(kept: Tensor, tokens: int, block: int) -> Tensor:
    """Return the share of all scores that lie in kept blocks: [] float32."""
    sizes = block_sizes(tokens, block, kept.device) / tokens
    shares: Tensor = kept.float() @ sizes @ sizes
    return shares.mean()


def sample_mass(q: Tensor, k: Tensor, kept: Tensor, block: int) -> Tensor:
    """Return the share of the softmax that kept blocks hold, over `SAMPLED_QUERIES`: [] float32.

    Every key is read and widened to float32, some heads at a time: at 75,600 tokens that takes
    more than 1 % of sparse attention. So it is measured when blocks are chosen, not in every pass.

    Args:
        q, k: [B, S, heads, D], rotated.
    """
    tokens = q.shape[1]
    count = min(tokens, SAMPLED_QUERIES)
    rows = torch.arange(count, device=q.device) * tokens // count
    block_of = torch.arange(tokens, device=q.device) // block
    queries, keys = q[:, rows].transpose(1, 2), k.permute(0, 2, 3, 1)
    kept_of_rows = kept[:, :, block_of[rows]]
    at_once = max(1, MAX_SCORES // keys[:, 0].numel())
    held = [
        ((some.float() @ all_keys.float() * q.shape[-1] ** -0.5).softmax(-1) * seen[..., block_of])
        .sum(-1)
        .flatten()
        for some, all_keys, seen in zip(
            *(torch.split(each, at_once, 1) for each in (queries, keys, kept_of_rows)), strict=True
        )
    ]
    return torch.cat(held).mean()


def block_sizes(tokens: int, block: int, device: torch.device) -> Tensor:
    """Return how many tokens each block has: [M] float32; only the last may have fewer."""
    starts = torch.arange(0, tokens, block, device=device)
    return (tokens - starts).clamp(max=block).float()


def _means(x: Tensor, block: int) -> Tensor:
    """Average the tokens of each block: [B, S, heads, D] → [B, heads, M, D] float32.

    Tokens are read once, in place: no copy of them is made.
    """
    whole = x.shape[1] // block * block
    blocks = x[:, :whole].view(x.shape[0], whole // block, block, *x.shape[2:])
    means = [blocks.mean(2, dtype=torch.float32)]
    if whole < x.shape[1]:
        means.append(x[:, whole:].mean(1, keepdim=True, dtype=torch.float32))
    return torch.cat(means, dim=1).transpose(1, 2)
