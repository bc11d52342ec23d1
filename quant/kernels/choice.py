"""Which kernels a device runs on, found out by trying them.

Kernels are compiled where they run, by libraries that may not be there and for cards that may not
do what they say: so each way of running is tried on small tensors and compared with plain torch
before it is trusted. What fails is said once, and plain torch runs instead.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quant.errors import ConversionError
from quant.kernels.eager import EagerKernels
from quant.kernels.interface import AttentionScales, BlockLinear, Kernels, Norm
from quant.linear import Hif8Linear
from quant.metrics import sqnr_db
from quant.scaling import scale_policy

logger = logging.getLogger(__name__)

FP8_CAPABILITY = (8, 9)
"""The first compute capability whose tensor cores multiply E4M3."""

AGREEMENT_DB = 20.0
"""Of a kernel with plain torch on the same tensors. A wrong one is below 5; FP8 attention, which
rounds its softmax as it goes, is at 30."""

SCALE = 0.25
"""Of all that is rounded in the trial."""


@dataclass(frozen=True, slots=True)
class KernelChoice:
    """The kernels to run on, and why they are not the device's fastest, if they are not."""

    kernels: Kernels
    warning: str | None = None


def pick_kernels(
    device: torch.device,
    *,
    quantized: bool,
    scales_rows: bool = False,
    fp8_attention: bool = False,
) -> KernelChoice:
    """Choose for a mode on `device`: plain torch where nothing better runs.

    Args:
        quantized: whether the mode multiplies in 8 bits, which not every card can.
        scales_rows: whether products may take a scale for each row, too, as `QuantRecipe` has it.
        fp8_attention: whether its self-attention does, too, which needs `nvidia-cudnn-frontend`.
    """
    if device.type != "cuda":
        return KernelChoice(EagerKernels())
    capability = torch.cuda.get_device_capability(device)
    if quantized and capability < FP8_CAPABILITY:
        return KernelChoice(
            EagerKernels(),
            f"{torch.cuda.get_device_name(device)} (compute capability {capability[0]}."
            f"{capability[1]}) has no FP8 tensor cores, which begin with 8.9: quantized modes are "
            "emulated. They save memory, and take longer than bf16, because every weight is "
            "decoded to BF16 for every product.",
        )
    name = torch.cuda.get_device_name(device)
    try:
        # Needs Triton, which machines without a card do not have.
        from quant.kernels.cuda import CudaKernels  # noqa: PLC0415

        kernels = CudaKernels()
        check_kernels(kernels, device, quantized=quantized, scales_rows=scales_rows)
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise  # says nothing of the kernels
    except Exception as error:
        # Compilers and drivers fail in every way there is; whichever it is, the model can run.
        logger.warning("kernels for %s do not run", name, exc_info=True)
        return KernelChoice(
            EagerKernels(),
            f"The kernels for {name} do not run ({_reason(error)}); plain torch runs instead, "
            "which is slower, in quantized modes slower than bf16.",
        )
    if fp8_attention:
        _check_fp8_attention(kernels, device, name)
    return KernelChoice(kernels)


def _check_fp8_attention(kernels: Kernels, device: torch.device, name: str) -> None:
    """Nothing stands in for it: emulated, it would take minutes for one step of the full size."""
    try:
        check_kernels(kernels, device, quantized=True, fp8_attention=True)
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except Exception as error:
        raise ConversionError(
            f"FP8 attention does not run on {name} ({_reason(error)}): it needs the package "
            "nvidia-cudnn-frontend (the extra `cuda`) and a card it supports; install it, or take "
            "a recipe with attention 'bf16'"
        ) from error


def _reason(error: Exception) -> str:
    """The last line of what it says: compilers begin with where, and end with why."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [""]
    return f"{type(error).__name__}: {lines[-1].strip()}"[:300]


@torch.no_grad()
def check_kernels(
    kernels: Kernels,
    device: torch.device,
    *,
    quantized: bool,
    scales_rows: bool = False,
    fp8_attention: bool = False,
) -> None:
    """Run every kernel once on small tensors and compare it with plain torch.

    Raises:
        ConversionError: one of them computes something else.
        Exception: whatever a kernel that does not compile or run raises.
    """
    if quantized:
        _check_edges(kernels, device)
    trial = _Trial(device, quantized, fp8_attention, scales_rows)
    expected = trial.run(EagerKernels())
    for name, found in trial.run(kernels).items():
        agreement = sqnr_db(expected[name], found)
        if agreement < AGREEMENT_DB:
            raise ConversionError(
                f"its {name} agrees with plain torch to {agreement:.0f} dB only, where "
                f"{AGREEMENT_DB:.0f} are wanted"
            )


def _check_edges(kernels: Kernels, device: torch.device) -> None:
    """NaN has to stay NaN, and what is too large the largest there is, with its sign."""
    edges = torch.tensor([float("nan"), float("inf"), -1e30], dtype=torch.bfloat16, device=device)
    nan, high, low = _value(kernels.round_act(edges, SCALE)).tolist()
    if not (math.isnan(nan) and high >= 384 * SCALE and low == -high):
        raise ConversionError(f"its rounding makes {[nan, high, low]} of NaN, infinity and -1e30")


class _Trial:
    """A little of everything that a block asks for; as many tokens as no tile is a part of."""

    heads, width, tokens = 2, 256, 1100

    def __init__(
        self, device: torch.device, quantized: bool, fp8_attention: bool, scales_rows: bool
    ) -> None:
        self._generator = torch.Generator().manual_seed(0)
        self._device = device
        self.x, self.delta = (self._randn(1, self.tokens, self.width) for _ in range(2))
        factor, shift = (self._randn(1, self.width).float() for _ in range(2))
        self.norm = Norm(factor, shift, 1e-6, plus_one=True)
        self.q_norm = nn.RMSNorm(self.width, eps=1e-6).to(device, torch.bfloat16)
        angles = self._randn(1, self.tokens, 1, self.width // self.heads // 2).float()
        cos, sin = (turn(angles).repeat_interleave(2, -1) for turn in (torch.cos, torch.sin))
        self.rope = (cos, sin)
        self.linear = nn.Linear(self.width, 3 * self.width, bias=True).to(device, torch.bfloat16)
        self.linear.weight.data = self._randn(3 * self.width, self.width) / 16
        self.act_scale = SCALE if quantized else None
        self.weight_scales = {"product": torch.tensor(SCALE, device=device)}
        if scales_rows:  # no two the same, and no powers of two
            rows = torch.arange(3 * self.width, device=device) / self.width
            self.weight_scales["product by rows"] = (SCALE * (1.1 + rows)).unsqueeze(1)
        self.scales = AttentionScales(SCALE / 2, SCALE, 2 * SCALE, SCALE) if fp8_attention else None

    def run(self, on: Kernels) -> dict[str, Tensor]:
        """What `on` computes, in values."""
        act_scale, norm = self.act_scale, self.norm
        total, normed = on.add_norm(self.x, self.delta, norm.factor, norm, act_scale)
        products = {name: self._product(on, name)(normed) for name in self.weight_scales}
        qkv = products["product"]
        q, k, v = on.norm_rope(qkv, self.q_norm, self.q_norm, self.rope, self.heads, self.scales)
        codes = {
            "norm": normed,
            "attention": on.attention(q, k, v, self.scales, self.tokens),
            "GELU": on.gelu(self.x, act_scale),
            "rounding": on.round_act(self.x, act_scale),
        }
        values = {
            "sum": total,
            "gated sum": on.add_gated(self.x, self.delta, norm.factor),
            "rotary embedding": _value(q, SCALE if self.scales is None else self.scales.q),
        }
        return values | products | {name: _value(code) for name, code in codes.items()}

    def _product(self, on: Kernels, name: str) -> BlockLinear:
        if self.act_scale is None:
            return on.plain([self.linear])
        act_scale = torch.tensor(SCALE, device=self._device)
        quantized = Hif8Linear.from_linear(
            self.linear,
            self.weight_scales[name],
            act_scale=act_scale,
            act_policy=scale_policy("pow2"),
        )
        return on.quantized([quantized])

    def _randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator).to(self._device, torch.bfloat16)


def _value(code: Tensor, scale: float = SCALE) -> Tensor:
    """Kernels hand on values, or multiples of the scale in 8 bits."""
    return code.float() * (scale if code.element_size() == 1 else 1.0)
