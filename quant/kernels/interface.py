"""What a Wan block asks of a device: its matrix products, and what stands between them.

`quant.transformer.wan_block.FusedWanBlock` is written against this alone. Activations that a
quantized product takes travel in a form of the kernels' own (HiFloat8 values as BF16 or as E4M3
codes), which only the product of the same kernels reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from quant.numerics.linear import Hif8Linear

Rope = tuple[Tensor, Tensor]
"""Cosines and sines, [1, S, 1, D] float32, every angle twice."""

KEYS_MULTIPLE = 128
"""FP8 attention is given keys and values with room up to a multiple of this; why is in
`quant.kernels.cudnn_attention`."""


@dataclass(frozen=True, slots=True)
class AttentionScales:
    """Static scales of FP8 self-attention: of queries, keys and values, and of what comes out."""

    q: float
    k: float
    v: float
    out: float


@dataclass(frozen=True, slots=True)
class Norm:
    """A layer norm of each token and what follows it: norm(x) * factor + shift.

    With `plus_one` factor and shift are [B, K], and the factor is 1 + factor; without, they are the
    norm's own weights, [1, K].
    """

    factor: Tensor
    shift: Tensor
    eps: float
    plus_one: bool


class BlockLinear(Protocol):
    """One or more linears that share their input, as one product."""

    @property
    def act_scale(self) -> float | None:
        """What its input is rounded with; None where it takes BF16."""

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., K] in the kernels' form → [..., sum of N] bf16."""


class Kernels(Protocol):
    """One way to run a block. B batch, S tokens, K width; tensors are contiguous."""

    name: str

    def plain(self, linears: Sequence[nn.Linear]) -> BlockLinear:
        """Prepare BF16 linears that share their input; a module."""

    def quantized(self, linears: Sequence[Hif8Linear]) -> BlockLinear:
        """Prepare quantized linears that share their input; a module."""

    def add_norm(
        self,
        x: Tensor,
        delta: Tensor | None,
        gate: Tensor | None,
        norm: Norm,
        act_scale: float | None,
    ) -> tuple[Tensor, Tensor]:
        """The sum x + delta * gate, and its `norm` in the form `act_scale` says.

        x, delta [B, S, K] bf16; gate [B, K]; without a delta the sum is x.
        """

    def add_gated(self, x: Tensor, delta: Tensor, gate: Tensor | None) -> Tensor:
        """x + delta * gate, [B, S, K] bf16."""

    def norm_rope(
        self,
        x: Tensor,
        q_norm: nn.RMSNorm,
        k_norm: nn.RMSNorm | None,
        rope: Rope | None,
        heads: int,
        scales: AttentionScales | None,
    ) -> tuple[Tensor, ...]:
        """Split x [B, S, P*K] into P parts; normalise and turn the first (queries) and second
        (keys), leave the third. Returns [B, S, heads, D] each, in the form `attention` takes; keys
        and values may be longer, the rest being room."""

    def gelu(self, x: Tensor, act_scale: float | None) -> Tensor:
        """GELU (tanh) of x [..., K] bf16, in the form `act_scale` says."""

    def round_act(self, x: Tensor, act_scale: float | None) -> Tensor:
        """x [..., K] bf16 in the form `act_scale` says."""

    def misfits(self, x: Tensor, act_scale: float) -> Tensor:
        """Count what the form of `act_scale` cannot hold of x [..., K] bf16: [2] int64.

        First the values that saturate, then those other than zero that become zero.
        """

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, scales: AttentionScales | None, tokens: int
    ) -> Tensor:
        """Attention of q [B, S, heads, D] to the first `tokens` of k and v [B, T, heads, D].

        Returns [B, S, heads*D]: bf16, or, with scales, in the form of `scales.out`.
        """
