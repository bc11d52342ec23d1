"""Wrap kernels to count the activations that their rounding saturates or flushes to zero."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from quant.kernels.interface import AttentionScales, BlockLinear, Kernels, Norm, Rope
from quant.numerics.hadamard import rotate_groups
from quant.numerics.int8_linear import Int8Linear
from quant.numerics.linear import Hif8Linear


class CountingKernels:
    """Implements `quant.kernels.interface.Kernels` with the same results, to the last bit.

    What the wrapped kernels would round while they compute is computed in BF16 first, counted, and
    rounded afterwards. Each rounding therefore costs a few more passes through memory. Two things
    are not counted: what FP8 attention rounds internally, and what a block has cached from an
    earlier pass.
    """

    def __init__(self, kernels: Kernels, add: Callable[[Tensor, int], None]) -> None:
        """Wrap `kernels`; `add` receives each rounding's `misfits` and its number of values."""
        self.name = kernels.name
        self._kernels = kernels
        self._add = add

    def plain(self, linears: Sequence[nn.Linear]) -> BlockLinear:
        return self._kernels.plain(linears)

    def quantized(self, linears: Sequence[Hif8Linear]) -> BlockLinear:
        return self._kernels.quantized(linears)

    def int8(self, linears: Sequence[Int8Linear]) -> BlockLinear:
        return self._kernels.int8(linears)

    def add_norm(
        self,
        x: Tensor,
        delta: Tensor | None,
        gate: Tensor | None,
        norm: Norm,
        act_scale: float | None,
    ) -> tuple[Tensor, Tensor]:
        total, normed = self._kernels.add_norm(x, delta, gate, norm, None)
        return total, self.round_act(normed, act_scale)

    def add_gated(self, x: Tensor, delta: Tensor, gate: Tensor | None) -> Tensor:
        return self._kernels.add_gated(x, delta, gate)

    def norm_rope(
        self,
        x: Tensor,
        q_norm: nn.RMSNorm,
        k_norm: nn.RMSNorm | None,
        rope: Rope | None,
        heads: int,
        scales: AttentionScales | None,
    ) -> tuple[Tensor, ...]:
        parts = self._kernels.norm_rope(x, q_norm, k_norm, rope, heads, None)
        if scales is None:
            return parts
        if scales.rotate:
            q, k, v = parts
            parts = rotate_groups(q), rotate_groups(k), v
        each_scale = (scales.q, scales.k, scales.v)
        return tuple(self.round_act(*each) for each in zip(parts, each_scale, strict=True))

    def gelu(self, x: Tensor, act_scale: float | None) -> Tensor:
        return self.round_act(self._kernels.gelu(x, None), act_scale)

    def round_act(self, x: Tensor, act_scale: float | None) -> Tensor:
        if act_scale is not None:
            self._count(x, act_scale)
        return self._kernels.round_act(x, act_scale)

    def misfits(self, x: Tensor, act_scale: float) -> Tensor:
        return self._kernels.misfits(x, act_scale)

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scales: AttentionScales | None,
        act_scale: float | None,
    ) -> Tensor:
        return self.round_act(self._kernels.attention(q, k, v, scales, None), act_scale)

    def sparse_attention(
        self, q: Tensor, k: Tensor, v: Tensor, kept: Tensor, block: int, act_scale: float | None
    ) -> Tensor:
        attended = self._kernels.sparse_attention(q, k, v, kept, block, None)
        return self.round_act(attended, act_scale)

    def _count(self, x: Tensor, act_scale: float) -> None:
        self._add(self._kernels.misfits(x, act_scale), x.numel())
