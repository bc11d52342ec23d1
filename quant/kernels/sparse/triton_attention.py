"""Attend to the kept blocks of keys only, in Triton: what is left out costs nothing.

`attend_blocks` computes what `quant.kernels.sparse.blocks.attend_blocks` emulates. First, a kernel
turns the choice into a list of blocks for each block of queries. Then each program attends a tile
of queries to the blocks of its list, with an online softmax in float32 (FlashAttention-2). Nothing
is read back to the host, so both kernels may be recorded in a CUDA graph.

Lists are in falling order. The last block of a sequence may be shorter, and if it is kept it comes
first: so only the first tile of keys has a mask. Softmax numerators are multiplied with their
values one tile later than they are computed. This way tensor cores multiply the values of a tile
while the softmax of the next one is computed, which compilers do not arrange by themselves.

Tiles are read through tensor descriptors, which Hopper and later GPUs copy in hardware (TMA).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

MAX_ROWS = 128
"""Queries of a program. A larger block is attended to by several programs."""

MIN_BLOCK = 16
"""The fewest tokens of a block: tensor cores multiply no smaller matrices."""

LARGE_SHARED = (9, 10)
"""Major compute capabilities with 227 KiB of shared memory for a program: H100, H200, B200."""


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a program is laid out (docs/decisions/042).

    Attributes:
        tile: keys multiplied at a time, at most; blocks are divided into tiles.
        stages: tiles of keys and of values in shared memory, being read or multiplied.
        warps: of 32 threads; Hopper multiplies with four at a time.
        reuse: free the first tile's shared memory before the loop over the others.
    """

    tile: int = 128
    stages: int = 3
    warps: int = 8
    reuse: bool = True


LARGE = Tiling()
SMALL = Tiling(tile=32, stages=2)


@triton.jit(do_not_specialize=["blocks"])
def _list_kept(kept_ptr, lists_ptr, counts_ptr, blocks, WIDTH: tl.constexpr):
    """List the kept blocks of a row from the last to the first, and count them."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    kept = tl.load(kept_ptr + row * blocks + columns, mask=columns < blocks, other=0).to(tl.int32)
    count = tl.sum(kept)
    tl.store(lists_ptr + row * blocks + count - tl.cumsum(kept), columns, mask=kept != 0)
    tl.store(counts_ptr + row, count)


@triton.jit
def _softmax(scores, largest, total, scale):
    """Return numerators, the factor of what was summed before, and the new maximum and sum."""
    new_largest = tl.maximum(largest, tl.max(scores, 1) * scale)
    numerators = tl.exp2(scores * scale - new_largest[:, None])
    factor = tl.exp2(largest - new_largest)
    return numerators, factor, new_largest, total * factor + tl.sum(numerators, 1)


@triton.jit(do_not_specialize=["tokens", "blocks", "heads"])
def _attend(
    q_desc, k_desc, v_desc, out_ptr, lists_ptr, counts_ptr, tokens, blocks, heads, scale,
    D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    REUSE: tl.constexpr,
):  # fmt: skip
    """Attend ROWS queries; `scale` is that of the scores, times the logarithm of e to base 2."""
    PARTS: tl.constexpr = BLOCK // TILE
    first_row = tl.program_id(0) * ROWS
    head = tl.program_id(1)
    batch = tl.program_id(2)
    line = (batch * heads + head) * blocks + first_row // BLOCK
    lists_ptr += line.to(tl.int64) * blocks
    tiles = tl.load(counts_ptr + line) * PARTS
    base = batch * tokens
    column = head * D
    # Tiles of a block are taken from the last to the first, without those behind the last token.
    first = tl.maximum(tl.load(lists_ptr) * BLOCK + BLOCK - tokens, 0) // TILE
    start = tl.load(lists_ptr) * BLOCK + (PARTS - 1 - first) * TILE
    q = q_desc.load([base + first_row, column])
    if REUSE:
        # A condition that always holds: what is in it does not hold its memory after it.
        scores = tl.zeros((ROWS, TILE), tl.float32)
        if tiles > 0:
            scores = tl.dot(q, k_desc.load([base + start, column]).T)
    else:
        scores = tl.dot(q, k_desc.load([base + start, column]).T)
    inside = start + tl.arange(0, TILE) < tokens
    scores = tl.where(inside[None, :], scores, -float("inf"))
    largest = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    numerators, factor, largest, total = _softmax(scores, largest, total, scale)
    sums = tl.zeros((ROWS, D), tl.float32)
    # Numbers of blocks are read an iteration ahead: reading them where they are used would take
    # one of the stages from the tiles.
    k_block = tl.load(lists_ptr + tl.minimum(first + 1, tiles - 1) // PARTS)
    v_block = tl.load(lists_ptr + first // PARTS)
    for index in tl.range(first + 1, tiles):
        k_start = base + k_block * BLOCK + (PARTS - 1 - index % PARTS) * TILE
        v_start = base + v_block * BLOCK + (PARTS - 1 - (index - 1) % PARTS) * TILE
        k_block = tl.load(lists_ptr + tl.minimum(index + 1, tiles - 1) // PARTS)
        v_block = tl.load(lists_ptr + index // PARTS)
        scores = tl.dot(q, k_desc.load([k_start, column]).T)
        v = v_desc.load([v_start, column])
        sums = tl.dot(numerators.to(v.dtype), v, sums * factor[:, None])
        numerators, factor, largest, total = _softmax(scores, largest, total, scale)
    # The last tile that is taken is the first one of its block.
    v_start = base + tl.load(lists_ptr + (tiles - 1) // PARTS) * BLOCK
    v = v_desc.load([v_start, column])
    sums = tl.dot(numerators.to(v.dtype), v, sums * factor[:, None])
    rows = first_row + tl.arange(0, ROWS)
    at = ((base + rows).to(tl.int64) * heads + head)[:, None] * D + tl.arange(0, D)[None, :]
    attended = sums * (1.0 / total)[:, None]
    tl.store(out_ptr + at, attended.to(out_ptr.dtype.element_ty), mask=(rows < tokens)[:, None])


def attend_blocks(
    q: Tensor, k: Tensor, v: Tensor, kept: Tensor, block: int, tiling: Tiling | None = None
) -> Tensor:
    """Attend q [B, S, heads, D] to the kept blocks of k and v [B, S, heads, D]: → [B, S, heads, D].

    Args:
        q, k, v: bf16; D is a power of two from 16 to 128. Triton's interpreter takes float32, as
            it multiplies no BF16.
        kept: [B, heads, M, M] bool, from `choose_blocks`; each block of queries keeps one at least.
        block: a power of two, `MIN_BLOCK` or more.
        tiling: by default the one for the device's shared memory.
    """
    if block < MIN_BLOCK or block & (block - 1):
        raise ValueError(f"blocks of {block} tokens: the kernel takes 16, 32, 64, 128 and so on")
    tiling = tiling or _tiling(q.device)
    batch, tokens, heads, width = q.shape
    lists, counts = list_kept(kept)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    rows, tile = min(block, MAX_ROWS), min(block, tiling.tile)
    descriptors = [
        TensorDescriptor.from_tensor(x.reshape(batch * tokens, heads * width), [size, width])
        for x, size in ((q, rows), (k, tile), (v, tile))
    ]
    _attend[(triton.cdiv(tokens, rows), heads, batch)](
        *descriptors, out, lists, counts, tokens, kept.shape[-1], heads,
        width**-0.5 * math.log2(math.e), D=width, BLOCK=block, ROWS=rows, TILE=tile,
        REUSE=tiling.reuse, num_warps=tiling.warps, num_stages=tiling.stages,
    )  # fmt: skip
    return out


def list_kept(kept: Tensor) -> tuple[Tensor, Tensor]:
    """List the kept blocks of each row of kept [B, heads, M, M], from the last to the first.

    Returns:
        lists, [B, heads, M, M] int32, of which the first `counts` count; counts, [B, heads, M].
    """
    kept = kept.contiguous()
    blocks = kept.shape[-1]
    lists = torch.empty(kept.shape, dtype=torch.int32, device=kept.device)
    counts = torch.empty(kept.shape[:-1], dtype=torch.int32, device=kept.device)
    _list_kept[(counts.numel(),)](
        kept.view(torch.uint8), lists, counts, blocks, WIDTH=triton.next_power_of_2(blocks)
    )
    return lists, counts


def _tiling(device: torch.device) -> Tiling:
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] in LARGE_SHARED:
        return LARGE
    return SMALL
