"""Run a Wan block on an Ascend NPU, by the public operations of torch_npu.

Scales, the order of operations and the precision of intermediate results are those of
`quant.kernels.eager`. With exact operations the results would be equal bit for bit, so a W8A8 video
does not depend on the kind of device beyond the rounding inside the NPU's own operations.

An Ascend 910B multiplies no 8-bit floating point. Weights stay in memory as ranks, one byte each,
and are decoded to BF16 for every product; activations are rounded in place and stay BF16 numbers
(`quant.numerics.hif8_int16`). `quant.kernels.ascend_triton` does the same in fewer passes, and
`quant.kernels.ascend_native` multiplies HiFloat8 where the chip can.

torch_npu is imported when an operation is called, because the import claims the process'
accelerator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quant import ascend
from quant.errors import ConversionError
from quant.kernels.eager import rotate
from quant.kernels.int8.ascend import AscendInt8Product
from quant.kernels.interface import AttentionScales, BlockLinear, Norm, Rope
from quant.kernels.joined_linear import JoinedLinear, joined_bias
from quant.kernels.sparse.blocks import attend_blocks
from quant.numerics import hif8_int16, reference
from quant.numerics.int8_linear import Int8Linear
from quant.numerics.linear import Hif8Linear

ROTARY_MAX_HEADS = 1000
ROTARY_MAX_HEAD_SIZE = 896
"""`npu_rotary_mul` takes fewer heads (times the batch), and smaller heads, than these."""


class AscendKernels:
    """Implements `quant.kernels.interface.Kernels`; the form for `act_scale` is BF16 numbers."""

    name = "ascend"

    def __init__(self, *, mixed_norm: bool = False) -> None:
        """Make the kernels.

        Args:
            mixed_norm: the layer norm takes BF16 input with float32 weights. Otherwise its input is
                converted to float32 before and its result to BF16 after, with the same rounding.
        """
        self._mixed_norm = mixed_norm

    @classmethod
    def load(cls, device: torch.device) -> Self:
        """Make the kernels for `device`, after trying what its operations take."""
        return cls(mixed_norm=_norm_takes_float32_weights(device))

    def plain(self, linears: Sequence[nn.Linear]) -> BlockLinear:
        return JoinedLinear(linears)

    def quantized(self, linears: Sequence[Hif8Linear]) -> BlockLinear:
        return RankLinear(linears, self)

    def int8(self, linears: Sequence[Int8Linear]) -> BlockLinear:
        return AscendInt8Product(linears)

    def decode(
        self, ranks: Tensor, weight_scale: float | Tensor, out: Tensor | None = None
    ) -> Tensor:
        """Dequantize weights: ranks [N, K] int8 → [N, K] bf16.

        Args:
            weight_scale: of the tensor; or [N, 1] float32, one for each row.
            out: [N, K] bf16, contiguous, to write into.
        """
        return hif8_int16.dequantize_ranks(ranks, weight_scale, out)

    def add_norm(
        self,
        x: Tensor,
        delta: Tensor | None,
        gate: Tensor | None,
        norm: Norm,
        act_scale: float | None,
    ) -> tuple[Tensor, Tensor]:
        if delta is not None:
            x = self.add_gated(x, delta, gate)
        return x, self.round_act(self._norm(x, norm), act_scale)

    def _norm(self, x: Tensor, norm: Norm) -> Tensor:
        width = list(x.shape[-1:])
        values = x if self._mixed_norm else x.float()
        factor, shift = norm.factor.float(), norm.shift.float()
        if not norm.plus_one:
            return F.layer_norm(values, width, factor[0], shift[0], norm.eps).type_as(x)
        import torch_npu  # noqa: PLC0415

        # Factor and shift are the weights of a norm, which writes its result once. The operation
        # has no batch of weights.
        parts = [
            torch_npu.npu_layer_norm_eval(each, width, weight, bias, norm.eps)
            for each, weight, bias in zip(values, 1 + factor, shift, strict=True)
        ]
        normed = parts[0].unsqueeze(0) if len(parts) == 1 else torch.stack(parts)
        return normed.type_as(x)

    def add_gated(self, x: Tensor, delta: Tensor, gate: Tensor | None) -> Tensor:
        if gate is None:
            return x + delta
        # The operations convert their BF16 inputs to float32 themselves: fewer passes than here.
        return (delta * gate.float().unsqueeze(1)).add_(x).type_as(x)

    def norm_rope(
        self,
        x: Tensor,
        q_norm: nn.RMSNorm,
        k_norm: nn.RMSNorm | None,
        rope: Rope | None,
        heads: int,
        scales: AttentionScales | None,
    ) -> tuple[Tensor, ...]:
        assert scales is None, "FP8 attention is refused on an NPU"
        parts = list(torch.split(x, q_norm.weight.shape[0], dim=-1))
        parts[0] = _rms_norm(parts[0], q_norm)
        if k_norm is not None:
            parts[1] = _rms_norm(parts[1], k_norm)
        parts = [part.reshape(*part.shape[:-1], heads, -1) for part in parts]
        if rope is not None:
            parts[:2] = [_rotate(part, rope) for part in parts[:2]]
        return tuple(parts)

    def gelu(self, x: Tensor, act_scale: float | None) -> Tensor:
        import torch_npu  # noqa: PLC0415

        # torch's own function leaves it to the version of CANN which approximation is computed.
        return self.round_act(torch_npu.npu_gelu(x, approximate="tanh"), act_scale)

    def round_act(self, x: Tensor, act_scale: float | None) -> Tensor:
        return x if act_scale is None else hif8_int16.fake_quantize(x, act_scale)

    def misfits(self, x: Tensor, act_scale: float) -> Tensor:
        return hif8_int16.misfits(x, act_scale)

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scales: AttentionScales | None,
        act_scale: float | None,
    ) -> Tensor:
        assert scales is None, "FP8 attention is refused on an NPU"
        import torch_npu  # noqa: PLC0415

        # BSND is how queries, keys and values lie in memory: any other layout copies all of them
        # and the result. Inner precision 0 sums in float32; 1 would sum in half precision.
        out = torch_npu.npu_fusion_attention(
            q, k, v, q.shape[2], "BSND", scale=q.shape[-1] ** -0.5, inner_precise=0
        )[0]
        return self.round_act(out.flatten(2), act_scale)

    def sparse_attention(
        self, q: Tensor, k: Tensor, v: Tensor, kept: Tensor, block: int, act_scale: float | None
    ) -> Tensor:
        return self.round_act(attend_blocks(q, k, v, kept, block).flatten(2), act_scale)


class RankLinear(nn.Module):
    """Quantized linears that share their input, as one BF16 product of weights decoded for it.

    Buffers:
        ranks: [N, K] int8, of `hif8_int16.to_ranks`.
        row_scale: [N, 1] float32 if a linear has a scale for each row, otherwise None.
    """

    ranks: Tensor
    row_scale: Tensor | None

    def __init__(self, linears: Sequence[Hif8Linear], kernels: AscendKernels) -> None:
        """Recode the weights of linears.

        Raises:
            ConversionError: weights are NaN or infinite.
        """
        super().__init__()
        self._kernels = kernels
        self._rows = [each.out_features for each in linears]
        ranks = torch.cat([hif8_int16.to_ranks(each.weight_qdata) for each in linears])
        self.act_scale, self._scales = read_scales(linears, ranks)
        row_scale = None
        if not self._scales:
            by_linear = [(each.weight_scale.float(), each.out_features) for each in linears]
            row_scale = torch.cat([scale.expand(rows, 1) for scale, rows in by_linear])
        self.register_buffer("ranks", ranks)
        self.register_buffer("row_scale", row_scale)
        self.bias = joined_bias(linears)
        self.weight_ahead: Callable[[], Tensor] | None = None  # set by `quant.transformer.prefetch`

    def decoded_weight(self, out: Tensor | None = None) -> Tensor:
        """Return the weights: [N, K] bf16; written into `out` if it is given."""
        if self.row_scale is not None:
            return self._kernels.decode(self.ranks, self.row_scale, out)
        if len(set(self._scales)) == 1:
            return self._kernels.decode(self.ranks, self._scales[0], out)
        if out is None:
            out = torch.empty(self.ranks.shape, dtype=torch.bfloat16, device=self.ranks.device)
        parts = (torch.split(each, self._rows) for each in (self.ranks, out))
        for ranks, target, scale in zip(*parts, self._scales, strict=True):
            self._kernels.decode(ranks, scale, target)
        return out

    def forward(self, x: Tensor) -> Tensor:
        weight = self.decoded_weight() if self.weight_ahead is None else self.weight_ahead()
        return reference.product(x, weight, self.bias)


def read_scales(
    linears: Sequence[Hif8Linear], ranks: Tensor | None = None
) -> tuple[float, list[float]]:
    """Read scales from the device, with a single synchronization, and check ranks.

    Returns:
        the scale of the linears' shared input: the largest, so that the input of none saturates;
        and the weight scale of each linear, or nothing if one of them has several.

    Raises:
        ConversionError: a weight has no rank.
    """
    acts = [each.act_scale.reshape(1) for each in linears if each.act_scale is not None]
    scales = [
        each.weight_scale.float().reshape(1) for each in linears if each.weight_scale.numel() == 1
    ]
    if len(scales) < len(linears):
        scales = []
    without_rank = torch.zeros(1, device=acts[0].device)
    if ranks is not None:
        without_rank = (ranks == hif8_int16.NO_RANK).any().float().reshape(1)
    values: list[float] = torch.cat([*acts, *scales, without_rank]).tolist()
    if values[-1]:
        raise ConversionError(
            f"quantized weights of {list(linears[0].weight_qdata.shape)} have codes of NaN or "
            "infinity: quantize them again from finite weights"
        )
    return max(values[: len(acts)]), values[len(acts) : -1]


def _rms_norm(x: Tensor, norm: nn.RMSNorm) -> Tensor:
    import torch_npu  # noqa: PLC0415

    eps = torch.finfo(x.dtype).eps if norm.eps is None else norm.eps
    normed: Tensor = torch_npu.npu_rms_norm(x, norm.weight, eps)[0]
    return normed


def _rotate(x: Tensor, rope: Rope) -> Tensor:
    """Rotate x [B, S, heads, D] bf16 in float32, as angles are, and round once."""
    batch, _, heads, head_size = x.shape
    if batch * heads >= ROTARY_MAX_HEADS or head_size >= ROTARY_MAX_HEAD_SIZE:
        return rotate(x, rope)
    import torch_npu  # noqa: PLC0415

    rotated: Tensor = torch_npu.npu_rotary_mul(x.float(), *rope, "interleave")
    return rotated.type_as(x)


def _norm_takes_float32_weights(device: torch.device) -> bool:
    """Try whether the layer norm takes BF16 input with float32 weights, and uses all their bits."""
    import torch_npu  # noqa: PLC0415

    x = torch.tensor([1.0, -1.0], dtype=torch.bfloat16).repeat(32).to(device)
    # In BF16 the weight would be 1, and the difference nothing.
    weight, bias = torch.full((64,), 1 + 2.0**-9), torch.full((64,), -1.0)
    try:
        normed = torch_npu.npu_layer_norm_eval(
            x.unsqueeze(0), [64], weight.to(device), bias.to(device), 1e-12
        )
        difference = float(normed.float()[0, 0])
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError) as error:
        if ascend.says_full(error) or ascend.says_lost(error):
            raise  # not caused by the types
        return False
    return abs(difference - 2.0**-9) < 2.0**-11
