"""Decode the weights of the next product while the current one multiplies.

Decoding is work for a device's vector units, and multiplying for its matrix units, so both can run
at once: the decoding on a stream of its own. Two buffers, each as large as the largest weights,
take turns. What a product reads is not written before that product has ended.

A CPU has no streams. Products there decode their weights when they need them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from math import prod
from typing import Any, Protocol, TypeGuard

import torch
from torch import Tensor

from quant.device import ACCELERATORS, backend

BUFFERS = 2
"""Decoded weights at a time: those that are multiplied and those of the next product."""


class DecodingProduct(Protocol):
    """A product that decodes its weights [N, K] each time, as `quant.kernels.ascend.RankLinear`."""

    ranks: Tensor
    weight_ahead: Callable[[], Tensor] | None

    def decoded_weight(self, out: Tensor | None = None) -> Tensor:
        """Return the weights: [N, K] bf16; written into `out` if it is given."""


class Streams(Protocol):
    """The stream that multiplies and the one that decodes, and what each waits for."""

    def mark(self) -> Any:
        """Return a mark behind all work that the multiplying stream has been given."""

    def decode_after(self, mark: Any, decode: Callable[[], object]) -> Any:
        """Run `decode` on the decoding stream, after a mark; return a mark behind it."""

    def wait_for(self, mark: Any) -> None:
        """Have the multiplying stream wait for a mark of the decoding one."""


class DeviceStreams:
    """Streams of a CUDA or Ascend device: the current one, and one of its own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._module = next(backend(kind) for kind in ACCELERATORS if kind == device.type)
        self._side = self._module.Stream(device)

    def mark(self) -> Any:
        return self._module.current_stream(self._device).record_event()

    def decode_after(self, mark: Any, decode: Callable[[], object]) -> Any:
        self._side.wait_event(mark)
        with self._module.stream(self._side):
            decode()
        return self._side.record_event()

    def wait_for(self, mark: Any) -> None:
        self._module.current_stream(self._device).wait_event(mark)


class DecodedWeights:
    """The weights of products, decoded one product ahead of their use."""

    def __init__(self, products: Sequence[DecodingProduct], streams: Streams) -> None:
        """Decode for `products`, which are computed in this order, pass after pass."""
        self._products = tuple(products)
        self._streams = streams
        self._buffers: list[Tensor] = []
        self._held: list[tuple[int, Any] | None] = [None] * BUFFERS  # product, and a mark behind it
        self._last = 0

    def weight(self, index: int) -> Tensor:
        """Return the weights of a product, [N, K] bf16, for work that is enqueued at once.

        They stay valid for what is enqueued on the current stream before the next call.
        """
        self._allocate()
        # All earlier products have been enqueued. What follows this mark may write to any buffer.
        mark = self._streams.mark()
        held = [each is not None and each[0] == index for each in self._held]
        buffer = held.index(True) if any(held) else self._next(self._last)
        weight = self._decode(index, buffer, mark)
        if index + 1 < len(self._products):
            self._decode(index + 1, self._next(buffer), mark)
        self._last = buffer
        present = self._held[buffer]
        assert present is not None
        self._streams.wait_for(present[1])
        return weight

    def _decode(self, index: int, buffer: int, mark: Any) -> Tensor:
        """Have a buffer hold the weights of a product; enqueue their decoding if it does not."""
        product = self._products[index]
        out = self._buffers[buffer][: product.ranks.numel()].view(product.ranks.shape)
        present = self._held[buffer]
        if present is None or present[0] != index:
            self._held[buffer] = None  # if decoding fails, the buffer holds nothing
            done = self._streams.decode_after(mark, partial(product.decoded_weight, out))
            self._held[buffer] = index, done
        return out

    def _allocate(self) -> None:
        if not self._buffers:
            size = max(prod(each.ranks.shape) for each in self._products)
            device = self._products[0].ranks.device
            self._buffers = [
                torch.empty(size, dtype=torch.bfloat16, device=device) for _ in range(BUFFERS)
            ]

    @staticmethod
    def _next(buffer: int) -> int:
        return (buffer + 1) % BUFFERS


def decode_ahead(
    products: Iterable[object], streams_of: Callable[[torch.device], Streams | None] | None = None
) -> None:
    """Have products that decode their weights do so one product ahead.

    Args:
        products: in the order in which every pass computes them. Those that decode nothing, or on
            a device without streams, are left as they are.
        streams_of: makes the streams of a device; None if it has none. By default its own.
    """
    decoding = [each for each in products if _decodes(each)]
    if not decoding:
        return
    streams = (streams_of or _streams)(decoding[0].ranks.device)
    if streams is None:
        return
    weights = DecodedWeights(decoding, streams)
    for index, product in enumerate(decoding):
        product.weight_ahead = partial(weights.weight, index)


def _decodes(product: object) -> TypeGuard[DecodingProduct]:
    # isinstance() with a protocol does not see a module's buffers, from Python 3.12 on.
    return all(hasattr(product, name) for name in ("ranks", "weight_ahead", "decoded_weight"))


def _streams(device: torch.device) -> Streams | None:
    return DeviceStreams(device) if device.type in ACCELERATORS else None
