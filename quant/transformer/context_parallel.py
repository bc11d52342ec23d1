"""Context parallelism (Ulysses): the tokens of one video shared out over cards.

Every card runs all layers on its own part of the tokens. Only self-attention looks across tokens:
for its length cards trade, so that each has all tokens of some of the heads
(https://arxiv.org/abs/2309.14509). One transformer runs so whenever a group of cards is set, and
as ever while there is none; it can be another group from one forward to the next.

diffusers' own context parallelism is for its own attention: docs/decisions/010 says why it is not
used here.
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
from quant.kernels.interface import KEYS_MULTIPLE, AttentionScales
from quant.transformer.wan_block import FusedWanBlock, fuse_blocks

Attention = Callable[[Tensor, Tensor, Tensor, AttentionScales | None, int], Tensor]
"""`quant.kernels.interface.Kernels.attention`."""


class Ulysses:
    """What a card holds of a video's tokens, and its trade with the other cards.

    The cards of a group hold equal parts, in the order of their ranks.
    """

    def __init__(self, before_exchange: Callable[[], None] = lambda: None) -> None:
        """before_exchange: is called before each exchange, when nothing that may fail stands
        between it and the exchange any more; if it raises there is none.
        """
        self._before_exchange = before_exchange
        self._group: dist.ProcessGroup | None = None
        self._rank, self.cards = 0, 1

    @contextmanager
    def over(self, group: dist.ProcessGroup | None) -> Iterator[None]:
        """Share tokens out over the cards of `group`; None is this card alone."""
        self._group = group
        self._rank = 0 if group is None else dist.get_rank(group)
        self.cards = 1 if group is None else dist.get_world_size(group)
        try:
            yield
        finally:
            self._group, self._rank, self.cards = None, 0, 1

    def part(self, x: Tensor) -> Tensor:
        """This card's tokens of x [B, S, ...]."""
        if x.shape[1] % self.cards:
            raise ValueError(f"{x.shape[1]} tokens cannot be shared out over {self.cards} cards")
        return x.chunk(self.cards, dim=1)[self._rank].contiguous()

    def whole(self, x: Tensor) -> Tensor:
        """All cards' tokens: x [B, S / cards, K] → [B, S, K]."""
        if self._group is None:
            return x
        return gather(x, self._group, self._before_exchange).movedim(0, 1).flatten(1, 2)

    def attention(self, inner: Attention) -> Attention:
        """Self-attention over the tokens of all cards, by `inner` over some of the heads."""

        def traded(
            q: Tensor, k: Tensor, v: Tensor, scales: AttentionScales | None, tokens: int
        ) -> Tensor:
            if self._group is None:
                return inner(q, k, v, scales, tokens)
            every = tokens * self.cards
            q, k, v = self._to_heads(q, k[:, :tokens], v[:, :tokens])
            return self._to_tokens(inner(q, k, v, scales, every))

        return traded

    def _to_heads(self, *inputs: Tensor) -> list[Tensor]:
        """q, k, v [B, S / cards, heads, D] → [B, S, heads / cards, D]; k, v with room behind S."""
        parts = [self._dealt(_words(x), 2) for x in inputs]
        sent = [torch.empty(part.shape, dtype=part.dtype, device=part.device) for part in parts]
        tokens = self.cards * parts[0].shape[2]
        room = -tokens % KEYS_MULTIPLE
        taken = [_with_room(each, 0 if index == 0 else room) for index, each in enumerate(sent)]
        self._before_exchange()
        works = []
        for part, send, (take, _) in zip(parts, sent, taken, strict=True):
            send.copy_(part)
            works.append(self._trade(take, send))
        for work in works:
            work.wait()
        return [
            _by_batch(take, whole).view(x.dtype)
            for x, (take, whole) in zip(inputs, taken, strict=True)
        ]

    def _to_tokens(self, x: Tensor) -> Tensor:
        """[B, S, heads * D / cards] → [B, S / cards, heads * D]."""
        send = self._dealt(_words(x), 1).contiguous()
        taken = torch.empty_like(send)
        self._before_exchange()
        self._trade(taken, send).wait()
        return taken.permute(1, 2, 0, 3).flatten(2).view(x.dtype)

    def _dealt(self, x: Tensor, dim: int) -> Tensor:
        """x with `dim` in as many parts as there are cards: [cards, *x.shape, that one shorter]."""
        parts = (self.cards, x.shape[dim] // self.cards)
        return x.view(*x.shape[:dim], *parts, *x.shape[dim + 1 :]).movedim(dim, 0)

    def _trade(self, taken: Tensor, sent: Tensor) -> Any:
        """Start to give sent[i] to card i of the group, and to take taken[i] from it."""
        return dist.all_to_all_single(taken, sent, group=self._group, async_op=True)


def split_tokens(transformer: Any, ulysses: Ulysses) -> None:
    """Have a `WanTransformer3DModel` run on `ulysses`' part of the tokens, in place.

    Its blocks become fused ones if they are not yet. It takes and returns whole latents as before.

    Raises:
        ConversionError: blocks that cannot be fused are in the way.
    """
    if not any(isinstance(block, FusedWanBlock) for block in transformer.blocks):
        fuse_blocks(transformer, EagerKernels())
    left = [i for i, block in enumerate(transformer.blocks) if not isinstance(block, FusedWanBlock)]
    if left:
        raise ConversionError(
            f"blocks {left} cannot run on several cards: the recipe rounds each token on its own, "
            "or quantizes only some of the linears that share an input; run this mode on one card"
        )
    for block in transformer.blocks:
        block.self_attention = ulysses.attention(block.self_attention)
    transformer.rope.register_forward_hook(
        lambda _, __, angles: tuple(ulysses.part(each) for each in angles)
    )
    transformer.blocks[0].register_forward_pre_hook(
        lambda _, args: (ulysses.part(args[0]), *args[1:])
    )
    transformer.proj_out.register_forward_hook(lambda _, __, out: ulysses.whole(out))


def gather(x: Tensor, group: dist.ProcessGroup, before: Callable[[], None]) -> Tensor:
    """What every card of `group` has for x, in the order of their ranks: [cards, *x.shape].

    `before` is called when nothing that may fail stands between it and the exchange any more.
    """
    # As bytes: not every backend knows every type.
    mine = x.contiguous().view(-1).view(torch.uint8)
    every = mine.new_empty(dist.get_world_size(group), mine.numel())
    before()
    dist.all_gather_into_tensor(every.view(-1), mine, group=group)
    return every.view(x.dtype).view(-1, *x.shape)


def _words(x: Tensor) -> Tensor:
    """The last dimension in words of 8 bytes: copies of single bytes would take far longer."""
    return x.view(torch.int64)


def _with_room(like: Tensor, room: int) -> tuple[Tensor, Tensor | None]:
    """An empty tensor like `like` [cards, B, s, ...] to be received into, and for one video the
    memory around it, [1, cards * s + room, ...], of which the room is zero."""
    if like.shape[1] != 1:
        return torch.empty_like(like), None
    tokens = like.shape[0] * like.shape[2]
    whole = like.new_empty(1, tokens + room, *like.shape[3:])
    whole[:, tokens:].zero_()
    return whole[:, :tokens].view(like.shape), whole


def _by_batch(taken: Tensor, whole: Tensor | None) -> Tensor:
    """[cards, B, s, ...] → [B, cards * s, ...], without a copy where `_with_room` saw to it."""
    return taken.movedim(0, 1).flatten(1, 2) if whole is None else whole
