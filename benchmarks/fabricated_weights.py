"""Random weights that are awkward in the way a trained model's are, the same for the same seed.

Where quantization is measured, plain Gaussian weights flatter it. So weights have heavy tails (the
largest of a matrix lies some 20 standard deviations out), and a few channels of the transformer's
width are 10 to 50 times louder than the others where norms hand them to linears, whose weights are
as much smaller there. The rest is scaled so that 40 blocks neither fade nor overflow.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor

from quant.weights.writer import Spec

TAIL = 0.6  # sinh(0.6 x) / its deviation: 0.3 % beyond 4 deviations, and 20 in 70 million
LOUD_SHARE = 1 / 640  # 8 of 5120 channels
LOUD_FROM, LOUD_TO = 10.0, 50.0
_ONES = ("norm", "gamma")
_SHIFT_TABLE_ROWS = 6  # shift, scale, gate of self-attention, then of the feed-forward network
_LOUD_INPUTS = (".to_q.weight", ".to_k.weight", ".to_v.weight", ".ffn.net.0.proj.weight")


class Fabricator:
    """Makes the tensors of one part, each from a seed of its own."""

    def __init__(self, part: str, seed: int, layers: int, device: torch.device) -> None:
        self.part = part
        self.seed = seed
        self.residual = 1 / math.sqrt(2 * layers)
        self.device = device

    def make(self, spec: Spec) -> Tensor:
        """One tensor, on the host."""
        name, dtype, shape = spec
        if name.endswith("scale_shift_table"):
            tensor = self._shift_table(name, shape)
        elif len(shape) < 2 or any(word in name.split(".")[-2] for word in _ONES):
            tensor = self._normal(name, shape) * 0.02
            if name.endswith(("weight", "gamma")):
                tensor += 1
        elif "shared" in name or "embed_tokens" in name:
            tensor = self._normal(name, shape)
        else:
            tensor = self._weight(name, shape)
        return tensor.to(dtype).cpu()

    def _weight(self, name: str, shape: Sequence[int]) -> Tensor:
        fan_in = math.prod(shape[1:])
        deviation = math.sqrt((math.exp(2 * TAIL**2) - 1) / 2)
        tensor = self._normal(name, shape).mul_(TAIL).sinh_().div_(deviation * math.sqrt(fan_in))
        if name.endswith((".to_out.0.weight", ".ffn.net.2.weight", ".wo.weight", ".o.weight")):
            tensor *= self.residual
        if self.part == "transformer" and "attn1" in name and name.endswith(_LOUD_INPUTS):
            self._hush(tensor, name)
        if self.part == "transformer" and name.endswith(".ffn.net.0.proj.weight"):
            self._hush(tensor, name)
        return tensor

    def _shift_table(self, name: str, shape: Sequence[int]) -> Tensor:
        """[1, 6, width] of a block, or [1, 2, width] before the output."""
        tensor = self._normal(name, shape) * 0.1
        if shape[1] == _SHIFT_TABLE_ROWS:
            channels, factors = self._loud(name, shape[-1])
            for row in (1, 4):
                tensor[0, row, channels] = factors - 1
            tensor[0, (2, 5)] += 0.3
        return tensor

    def _hush(self, weight: Tensor, name: str) -> None:
        channels, factors = self._loud(name, weight.shape[1])
        weight[:, channels] /= factors

    def _loud(self, name: str, width: int) -> tuple[Tensor, Tensor]:
        """The loud channels of a block, and how loud: the same for all its tensors."""
        block = ".".join(name.split(".")[:2])
        count = max(1, round(width * LOUD_SHARE))
        generator = torch.Generator().manual_seed(self._seed_of(f"{block} loud"))
        channels = torch.randperm(width, generator=generator)[:count]
        ratio = torch.rand(count, generator=generator)
        factors = LOUD_FROM * (LOUD_TO / LOUD_FROM) ** ratio
        return channels.to(self.device), factors.to(self.device)

    def _normal(self, name: str, shape: Sequence[int]) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(self._seed_of(name))
        return torch.randn(*shape, generator=generator, device=self.device)

    def _seed_of(self, name: str) -> int:
        digest = hashlib.sha256(f"{self.seed}:{self.part}:{name}".encode()).digest()
        return int.from_bytes(digest[:8], "little") >> 1


@contextmanager
def made_ahead(
    specs: Sequence[Spec], make: Callable[[Spec], Tensor], threads: int
) -> Iterator[Callable[[str], Tensor]]:
    """A function that gives the tensors of `specs` in their order, while the next are being made.

    No more than twice `threads` of them are held.
    """
    waiting: dict[str, Future[Tensor]] = {}
    with ThreadPoolExecutor(threads, "fabricate") as pool:
        coming = iter(specs)

        def start() -> None:
            spec = next(coming, None)
            if spec is not None:
                waiting[spec[0]] = pool.submit(make, spec)

        def give(name: str) -> Tensor:
            tensor = waiting.pop(name).result()
            start()
            return tensor

        for _ in range(2 * threads):
            start()
        try:
            yield give
        finally:
            pool.shutdown(cancel_futures=True)
