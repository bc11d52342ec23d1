"""Define the operations that a Wan block needs from a device.

`quant.transformer.wan_block.FusedWanBlock` uses this interface only. The input of a quantized
product is in a form that the kernels choose: HiFloat8 values as BF16 numbers, or codes of value /
act_scale in E4M3 or HiFloat8 (uint8). Only the products of the same kernels read it. Where
`act_scale` is None, the form is BF16.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from quant.numerics.int8_linear import Int8Linear
from quant.numerics.linear import Hif8Linear

Rope = tuple[Tensor, Tensor]
"""Cosines and sines, [1, S, 1, D] float32; each angle appears twice."""


@dataclass(frozen=True, slots=True)
class AttentionScales:
    """Static scales of FP8 self-attention: of queries, keys and values.

    Attributes:
        rotate: whether queries and keys are rotated by `quant.numerics.hadamard` before they are
            rounded, which changes no score.
    """

    q: float
    k: float
    v: float
    rotate: bool = True


@dataclass(frozen=True, slots=True)
class Norm:
    """A layer norm of each token, followed by a factor and a shift: norm(x) * factor + shift.

    With `plus_one`, factor and shift are [B, K] and the norm is multiplied by 1 + factor. Without,
    they are the norm's own weights, [1, K].
    """

    factor: Tensor
    shift: Tensor
    eps: float
    plus_one: bool


class BlockLinear(Protocol):
    """One or more linears that share their input, computed as one product."""

    @property
    def act_scale(self) -> float | None:
        """Return the scale its input is rounded under; None if it takes BF16."""

    def __call__(self, x: Tensor) -> Tensor:
        """Multiply x [..., K], in the kernels' form for `act_scale` → [..., sum of N] bf16."""


class Kernels(Protocol):
    """The operations of a block on one kind of device.

    B is the batch, S the tokens, K the width. All tensors are contiguous.
    """

    name: str

    def plain(self, linears: Sequence[nn.Linear]) -> BlockLinear:
        """Build the product of BF16 linears that share their input; the result is a module."""

    def quantized(self, linears: Sequence[Hif8Linear]) -> BlockLinear:
        """Build the product of quantized linears that share their input; the result is a module."""

    def int8(self, linears: Sequence[Int8Linear]) -> BlockLinear:
        """Build the product of INT8 linears that share their input; the result is a module.

        It takes BF16 (`act_scale` is None) and quantizes each token itself.
        """

    def add_norm(
        self,
        x: Tensor,
        delta: Tensor | None,
        gate: Tensor | None,
        norm: Norm,
        act_scale: float | None,
    ) -> tuple[Tensor, Tensor]:
        """Return the sum x + delta * gate, and its `norm` in the form for `act_scale`.

        x, delta [B, S, K] bf16; gate [B, K]. Without a delta the sum is x; without a gate the delta
        is added as it is.
        """

    def add_gated(self, x: Tensor, delta: Tensor, gate: Tensor | None) -> Tensor:
        """Return x + delta * gate, [B, S, K] bf16."""

    def norm_rope(
        self,
        x: Tensor,
        q_norm: nn.RMSNorm,
        k_norm: nn.RMSNorm | None,
        rope: Rope | None,
        heads: int,
        scales: AttentionScales | None,
    ) -> tuple[Tensor, ...]:
        """Split x [B, S, P*K] into P parts: queries, keys, values.

        Queries and keys are normalised and rotated by `rope`, values are not.

        Returns:
            each part as [B, S, heads, D]: in BF16, or with `scales` in the form for FP8 attention.
        """

    def gelu(self, x: Tensor, act_scale: float | None) -> Tensor:
        """Return GELU (tanh) of x [..., K] bf16, in the form for `act_scale`."""

    def round_act(self, x: Tensor, act_scale: float | None) -> Tensor:
        """Return x [..., K] bf16 in the form for `act_scale`."""

    def misfits(self, x: Tensor, act_scale: float) -> Tensor:
        """Count the values of x [..., K] bf16 that the form for `act_scale` cannot hold: [2] int64.

        The first count is of values that saturate, the second of nonzero values that become zero.
        """

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scales: AttentionScales | None,
        act_scale: float | None,
    ) -> Tensor:
        """Attend q [B, S, heads, D] to k and v [B, T, heads, D].

        Args:
            scales: with them, q, k and v are in the form for FP8 attention.

        Returns:
            [B, S, heads*D] in the form for `act_scale`.
        """

    def sparse_attention(
        self, q: Tensor, k: Tensor, v: Tensor, kept: Tensor, block: int, act_scale: float | None
    ) -> Tensor:
        """Attend q [B, S, heads, D] to the kept blocks of k and v [B, S, heads, D].

        Args:
            kept: [B, heads, M, M] bool, of each block of `block` queries, the kept blocks of keys.

        Returns:
            [B, S, heads*D] in the form for `act_scale`.
        """
