"""Split the tokens of one video over several ranks (context parallelism by Ulysses).

Every rank runs all layers on its own part of the tokens. Only self-attention needs all tokens. For
its duration the ranks exchange tokens for heads, so that each rank has all tokens of some of the
heads (https://arxiv.org/abs/2309.14509). A transformer runs this way while a process group is set,
and unchanged while none is set. The group may change from one forward pass to the next.

diffusers' own context parallelism works with diffusers' own attention only: docs/decisions/010
explains why it is not used here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from quant.errors import ConversionError
from quant.kernels.eager import EagerKernels
from quant.kernels.interface import AttentionScales
from quant.transformer.wan_block import Attention, FusedWanBlock, fuse_blocks


class Ulysses:
    """This rank's part of a video's tokens, and its exchanges with the other ranks.

    The ranks of a group hold parts of equal size, in rank order.

    Attributes:
        world_size: number of ranks in the current group; 1 without a group.
    """

    def __init__(self, sync_or_abort: Callable[[], None] = lambda: None) -> None:
        """Start without a group: this rank alone has all tokens.

        Args:
            sync_or_abort: called immediately before each exchange, to wait for the other ranks. If
                it raises, no exchange happens. Nothing between the call and the exchange may fail,
                because the other ranks would then wait in the exchange for ever.
        """
        self._sync_or_abort = sync_or_abort
        self._group: dist.ProcessGroup | None = None
        self._rank, self.world_size = 0, 1

    @contextmanager
    def use_group(self, group: dist.ProcessGroup | None) -> Iterator[None]:
        """Split tokens over the ranks of `group` within the context; None means this rank alone."""
        self._group = group
        self._rank = 0 if group is None else dist.get_rank(group)
        self.world_size = 1 if group is None else dist.get_world_size(group)
        try:
            yield
        finally:
            self._group, self._rank, self.world_size = None, 0, 1

    def local_tokens(self, x: Tensor) -> Tensor:
        """Return this rank's tokens of x [B, S, ...].

        Raises:
            ValueError: the number of tokens is not a multiple of the number of ranks.
        """
        if x.shape[1] % self.world_size:
            raise ValueError(
                f"{x.shape[1]} tokens cannot be split evenly over {self.world_size} ranks"
            )
        return x.chunk(self.world_size, dim=1)[self._rank].contiguous()

    def all_tokens(self, x: Tensor) -> Tensor:
        """Gather the tokens of all ranks: x [B, S / ranks, K] → [B, S, K]."""
        if self._group is None:
            return x
        return all_gather(x, self._group, self._sync_or_abort).movedim(0, 1).flatten(1, 2)

    def attention(self, inner: Attention) -> Attention:
        """Return self-attention over the tokens of all ranks.

        On each rank, `inner` computes some of the heads.
        """

        def exchanged(
            q: Tensor,
            k: Tensor,
            v: Tensor,
            scales: AttentionScales | None,
            act_scale: float | None,
        ) -> Tensor:
            if self._group is None:
                return inner(q, k, v, scales, act_scale)
            q, k, v = self._gather_tokens(q, k, v)
            return self._gather_heads(inner(q, k, v, scales, act_scale))

        return exchanged

    def _gather_tokens(self, *inputs: Tensor) -> list[Tensor]:
        """Exchange heads for tokens: [B, S / ranks, heads, D] → [B, S, heads / ranks, D]."""
        chunks = [self._chunks(_as_int64(x), 2) for x in inputs]
        # Allocated before the call, because nothing may fail after it.
        sent, received = (
            [torch.empty(each.shape, dtype=each.dtype, device=each.device) for each in chunks]
            for _ in range(2)
        )
        self._sync_or_abort()
        works = []
        for chunk, send, receive in zip(chunks, sent, received, strict=True):
            send.copy_(chunk)
            works.append(self._start_all_to_all(receive, send))
        for work in works:
            work.wait()
        return [
            receive.movedim(0, 1).flatten(1, 2).view(x.dtype)
            for x, receive in zip(inputs, received, strict=True)
        ]

    def _gather_heads(self, x: Tensor) -> Tensor:
        """Exchange tokens for heads: [B, S, heads * D / ranks] → [B, S / ranks, heads * D]."""
        send = self._chunks(_as_int64(x), 1).contiguous()
        received = torch.empty_like(send)
        self._sync_or_abort()
        self._start_all_to_all(received, send).wait()
        return received.permute(1, 2, 0, 3).flatten(2).view(x.dtype)

    def _chunks(self, x: Tensor, dim: int) -> Tensor:
        """Split `dim` of x into one chunk per rank: [ranks, *x.shape with `dim` divided]."""
        sizes = (self.world_size, x.shape[dim] // self.world_size)
        return x.view(*x.shape[:dim], *sizes, *x.shape[dim + 1 :]).movedim(dim, 0)

    def _start_all_to_all(self, received: Tensor, sent: Tensor) -> Any:
        """Start to send sent[i] to rank i of the group and to receive received[i] from it.

        Without sizes of parts, so that HCCL has its all-to-all of equal parts.
        """
        return dist.all_to_all_single(received, sent, group=self._group, async_op=True)


def split_tokens(transformer: Any, ulysses: Ulysses) -> None:
    """Run a `WanTransformer3DModel` on this rank's part of the tokens, in place.

    Blocks are fused first if they are not yet. The transformer takes and returns complete latents
    as before.

    Raises:
        ConversionError: some blocks cannot be fused.
    """
    if not any(isinstance(block, FusedWanBlock) for block in transformer.blocks):
        fuse_blocks(transformer, EagerKernels())
    left = [i for i, block in enumerate(transformer.blocks) if not isinstance(block, FusedWanBlock)]
    if left:
        raise ConversionError(
            f"blocks {left} cannot run on several ranks: the recipe rounds each token on its own, "
            "or quantizes only some of the linears that share an input; run this mode on one device"
        )
    for block in transformer.blocks:
        block.wrap_attention = ulysses.attention
    transformer.rope.register_forward_hook(
        lambda _, __, angles: tuple(ulysses.local_tokens(each) for each in angles)
    )
    transformer.blocks[0].register_forward_pre_hook(
        lambda _, args: (ulysses.local_tokens(args[0]), *args[1:])
    )
    # First, because sparse attention undoes its order of all tokens there (`sparsify`).
    transformer.proj_out.register_forward_hook(
        lambda _, __, out: ulysses.all_tokens(out), prepend=True
    )


def all_gather(x: Tensor, group: dist.ProcessGroup, sync_or_abort: Callable[[], None]) -> Tensor:
    """Gather x from every rank of `group`, in rank order: [ranks, *x.shape].

    Args:
        sync_or_abort: called immediately before the exchange, as in `Ulysses`.
    """
    # As bytes, because not every backend supports every dtype.
    mine = x.contiguous().view(-1).view(torch.uint8)
    gathered = mine.new_empty(dist.get_world_size(group), mine.numel())
    sync_or_abort()
    dist.all_gather_into_tensor(gathered.view(-1), mine, group=group)
    return gathered.view(x.dtype).view(-1, *x.shape)


def _as_int64(x: Tensor) -> Tensor:
    """View the last dimension as 8-byte words: copies of single bytes would take far longer."""
    return x.view(torch.int64)
