"""Multiply HiFloat8 codes on an Ascend NPU that can (950PR, 950DT), under static scales.

Weights are the codes of the checkpoint, one byte each. Activations are rounded to codes by the
chip's own conversion. Whether a chip can is found out by doing: `torch_npu.hifloat8` exists on all
of them. One zero is converted to HiFloat8 and back, and then all BF16 values are converted and
compared with `quant.numerics.hif8`. Only a conversion that is equal for all of them is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Self

import torch
from torch import Tensor, nn

from quant.ascend import says_full, says_lost
from quant.errors import ConversionError
from quant.kernels.ascend import AscendKernels, read_scales
from quant.kernels.interface import BlockLinear
from quant.kernels.joined_linear import joined_bias
from quant.numerics import hif8
from quant.numerics.linear import Hif8Linear


class NativeHif8Kernels(AscendKernels):
    """Implements `quant.kernels.interface.Kernels`; the form for `act_scale` is HiFloat8 codes.

    They are uint8, of value / act_scale.
    """

    name = "ascend with native HiFloat8"

    def __init__(self, *, mixed_norm: bool = False, clamp: bool = False) -> None:
        """Make the kernels.

        Args:
            mixed_norm: as in `AscendKernels`.
            clamp: limit values to the largest of HiFloat8 before their conversion, because it would
                make infinities of larger ones.
        """
        super().__init__(mixed_norm=mixed_norm)
        self._clamp = clamp

    @classmethod
    def load(cls, device: torch.device) -> Self:
        """Make the kernels for `device`, after trying its conversion.

        Raises:
            ConversionError: it converts to other codes.
            Exception: whatever torch_npu raises on a chip or a version without HiFloat8.
        """
        _convert_one(device)
        mixed_norm = AscendKernels.load(device)._mixed_norm
        x, codes = hif8.all_bf16().to(device), hif8.bf16_codes()
        wrong = 0
        for clamp in (False, True):
            kernels = cls(mixed_norm=mixed_norm, clamp=clamp)
            wrong = int((kernels.round_act(x, 1.0).cpu() != codes).sum())
            if wrong == 0:
                return kernels
        raise ConversionError(
            f"its conversion gives other codes for {wrong} of {len(codes)} BF16 values"
        )

    def quantized(self, linears: Sequence[Hif8Linear]) -> BlockLinear:
        return NativeHif8Linear(linears)

    def round_act(self, x: Tensor, act_scale: float | None) -> Tensor:
        if act_scale is None:
            return x
        import torch_npu  # noqa: PLC0415

        if self._clamp:
            x = x.clamp(-hif8.LARGEST * act_scale, hif8.LARGEST * act_scale)
        # By multiplication, because the form that divides has no choice of rounding: this one
        # rounds half away from zero.
        factor = torch.full((1,), 1 / act_scale, device=x.device)
        codes = torch_npu.npu_quantize(x, factor, None, torch_npu.hifloat8, -1, False)
        # torch_npu has no type for codes. Meta tensors say bits8, and tensors uint8.
        as_bytes: Tensor = codes.view(torch.uint8)
        return as_bytes


class NativeHif8Linear(nn.Module):
    """Quantized linears that share their input, as one product of HiFloat8 codes.

    Buffers:
        weight: [N, K] uint8 codes.
        weight_scale: [1] float32 if all linears have the same scale, otherwise [N].
        input_scale: [1] float32, the scale of the shared input.
    """

    weight: Tensor
    weight_scale: Tensor
    input_scale: Tensor

    def __init__(self, linears: Sequence[Hif8Linear]) -> None:
        super().__init__()
        self.act_scale, scales = read_scales(linears)
        weight = torch.cat([each.weight_qdata for each in linears])
        if len(set(scales)) == 1:
            weight_scale = torch.full((1,), scales[0], device=weight.device)
        else:
            by_linear = [(each.weight_scale.float(), each.out_features) for each in linears]
            by_row = torch.cat([scale.expand(rows, 1) for scale, rows in by_linear])
            weight_scale = by_row.reshape(-1)
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", weight_scale)
        input_scale = torch.full((1,), self.act_scale, device=weight.device)
        self.register_buffer("input_scale", input_scale)
        self.bias = joined_bias(linears)

    def forward(self, x: Tensor) -> Tensor:
        import torch_npu  # noqa: PLC0415

        out: Tensor = torch_npu.npu_quant_matmul(
            x.reshape(-1, x.shape[-1]),
            self.weight.t(),
            self.weight_scale,
            pertoken_scale=self.input_scale,
            output_dtype=torch.bfloat16,
            x1_dtype=torch_npu.hifloat8,
            x2_dtype=torch_npu.hifloat8,
        )
        if self.bias is not None:
            # Not by the operation, which adds it before it scales, or after, depending on types.
            out = out.add_(self.bias)
        return out.view(*x.shape[:-1], -1)


@lru_cache
def converts_hifloat8(device: torch.device) -> bool:
    """Return whether the chip converts one zero to HiFloat8 and back.

    Versions without the type, and chips without the conversion, raise errors of many kinds.
    """
    try:
        _convert_one(device)
    except Exception as error:
        if isinstance(error, torch.OutOfMemoryError) or says_full(error) or says_lost(error):
            raise
        return False
    return True


def _convert_one(device: torch.device) -> None:
    import torch_npu  # noqa: PLC0415

    zero = torch.zeros(1, dtype=torch.bfloat16, device=device)
    code = torch_npu.npu_dtype_cast(zero, torch_npu.hifloat8)
    back = torch_npu.npu_dtype_cast(code, torch.bfloat16, torch_npu.hifloat8)
    if back.item() != 0:
        raise ConversionError(f"0 converted to HiFloat8 and back is {back.item()}")
