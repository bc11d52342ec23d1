"""Which kernels a device runs on, found out by trying them.

Kernels are compiled where they run, by libraries that may not be there and for cards that may not
do what they say: so each way of running is tried on small tensors and compared with plain torch
before it is trusted. What fails is said once, and plain torch runs instead.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from quant.errors import ConversionError
from quant.kernels.eager import EagerKernels
from quant.kernels.interface import AttentionScales, BlockLinear, Kernels, Norm, Rope
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

SMALL_TOKENS = 1100
"""As no tile is a part of."""

FEW_TOKENS = (24, 32)
"""Enough where the width is what matters; Triton compiles multiples of 16 apart from the rest."""


@dataclass(frozen=True, slots=True)
class BlockShape:
    """How wide a model's blocks are, which kernels are compiled for."""

    heads: int
    width: int
    ffn: int

    @classmethod
    def of(cls, config: Any) -> Self:
        """Of a `WanTransformer3DModel`'s configuration."""
        heads = config.num_attention_heads
        return cls(heads, heads * config.attention_head_dim, config.ffn_dim)


SMALL = BlockShape(heads=2, width=256, ffn=256)


def multiplies_fp8(device: torch.device) -> bool:
    """Whether a card's tensor cores multiply E4M3."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= FP8_CAPABILITY


@dataclass(frozen=True, slots=True)
class KernelChoice:
    """The kernels to run on, and why they are not the device's fastest, if they are not."""

    kernels: Kernels
    warning: str | None = None


def pick_kernels(
    device: torch.device,
    *,
    quantized: bool,
    shape: BlockShape | None = None,
    scales_rows: bool = False,
    fp8_attention: bool = False,
) -> KernelChoice:
    """Choose for a mode on `device`: plain torch where nothing better runs.

    Args:
        quantized: whether the mode multiplies in 8 bits, which not every card can.
        shape: of the model's blocks, that what is compiled for it is compiled now.
        scales_rows: whether products may take a scale for each row, too, as `QuantRecipe` has it.
        fp8_attention: whether its self-attention does, too, which needs `nvidia-cudnn-frontend`.

    Raises:
        ConversionError: FP8 attention does not run on this card.
    """
    if device.type != "cuda":
        return KernelChoice(EagerKernels())
    name = torch.cuda.get_device_name(device)
    if quantized and not multiplies_fp8(device):
        major, minor = torch.cuda.get_device_capability(device)
        reason = (
            f"{name} (compute capability {major}.{minor}) has no FP8 tensor cores, which begin "
            "with 8.9"
        )
        if fp8_attention:
            raise _no_fp8_attention(reason)
        return KernelChoice(
            EagerKernels(),
            f"{reason}: quantized modes are emulated. They save memory, and take longer than "
            "bf16, because every weight is decoded to BF16 for every product.",
        )
    try:
        # Needs Triton, which machines without a card do not have.
        from quant.kernels.cuda import CudaKernels  # noqa: PLC0415

        kernels = CudaKernels()
        check_kernels(kernels, device, quantized=quantized, shape=shape, scales_rows=scales_rows)
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise  # says nothing of the kernels
    except Exception as error:
        # Compilers and drivers fail in every way there is; whichever it is, the model can run.
        logger.debug("kernels for %s do not run", name, exc_info=True)
        reason = f"the kernels for {name} do not run ({_reason(error)})"
        if fp8_attention:
            raise _no_fp8_attention(reason) from error
        return KernelChoice(
            EagerKernels(),
            f"{reason[0].upper()}{reason[1:]}; plain torch runs instead, which is slower, in "
            "quantized modes slower than bf16.",
        )
    if fp8_attention:
        _check_fp8_attention(kernels, device, shape, name)
    return KernelChoice(kernels)


def _check_fp8_attention(
    kernels: Kernels, device: torch.device, shape: BlockShape | None, name: str
) -> None:
    try:
        check_kernels(kernels, device, quantized=True, shape=shape, fp8_attention=True)
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except Exception as error:
        raise _no_fp8_attention(
            f"on {name} it ends with {_reason(error)}; it needs the package nvidia-cudnn-frontend "
            "(the extra `cuda`) and a card that package supports"
        ) from error


def _no_fp8_attention(reason: str) -> ConversionError:
    """Nothing stands in for it on a card: docs/decisions/016."""
    return ConversionError(
        f"FP8 attention does not run here: {reason}; take a recipe with attention 'bf16'"
    )


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
    shape: BlockShape | None = None,
    scales_rows: bool = False,
    fp8_attention: bool = False,
) -> None:
    """Run every kernel on small tensors and compare it with plain torch.

    Args:
        shape: what is compiled for a width is tried in this one, too, on a few tokens.

    Raises:
        ConversionError: one of them computes something else.
        Exception: whatever a kernel that does not compile or run raises.
    """
    act_scale = SCALE if quantized else None
    if quantized:
        _check_edges(kernels, device)
    # The blocks that a recipe protects hand on BF16.
    forms = dict.fromkeys(((act_scale, fp8_attention), (None, False)))
    trials: list[_Trial] = [
        _Between(device, shape or SMALL, tokens, *form)
        for tokens in ((SMALL_TOKENS,) if shape is None else FEW_TOKENS)
        for form in forms
    ]
    trials.append(_Products(device, act_scale, scales_rows, fp8_attention))
    for trial in trials:
        expected = trial.run(EagerKernels())
        for name, found in trial.run(kernels).items():
            agreement = sqnr_db(expected[name], found)
            if not agreement >= AGREEMENT_DB:  # nor is NaN
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


class _Trial(Protocol):
    def run(self, on: Kernels) -> dict[str, Tensor]:
        """What `on` computes, in values, by what it is."""


class _Between:
    """What stands between a block's products, in every way that a block asks for it, in the form
    that quantized products take or in BF16."""

    def __init__(
        self,
        device: torch.device,
        shape: BlockShape,
        tokens: int,
        act_scale: float | None,
        fp8_attention: bool,
    ) -> None:
        draw = _Draw(device)
        self.heads, self._act_scale = shape.heads, act_scale
        self.x, self.delta = (draw(1, tokens, shape.width) for _ in range(2))
        self.qkv, self.widened = draw(1, tokens, 3 * shape.width), draw(1, tokens, shape.ffn)
        self.factor, self.shift = (draw(1, shape.width).float() for _ in range(2))
        self.q_norm = nn.RMSNorm(shape.width, eps=1e-6).to(device, torch.bfloat16)
        self.rope = _rope(draw, tokens, shape)
        self.scales = _attention_scales(fp8_attention)

    def run(self, on: Kernels) -> dict[str, Tensor]:
        act_scale, gate = self._act_scale, self.factor
        modulated, affine = (
            Norm(self.factor, self.shift, 1e-6, plus_one=plus_one) for plus_one in (True, False)
        )
        first = on.add_norm(self.x, None, None, modulated, act_scale)[1]
        gated, second = on.add_norm(self.x, self.delta, gate, affine, act_scale)
        added, third = on.add_norm(self.x, self.delta, None, modulated, act_scale)
        q, k, v = on.norm_rope(
            self.qkv, self.q_norm, self.q_norm, self.rope, self.heads, self.scales
        )
        (cross_q,) = on.norm_rope(self.x, self.q_norm, None, None, self.heads, None)
        codes = {
            "first norm": first,
            "second norm": second,
            "third norm": third,
            "GELU": on.gelu(self.widened, act_scale),
            "rounding": on.round_act(self.x, act_scale),
        }
        tokens = self.x.shape[1]
        q_scale, k_scale, v_scale = (
            (SCALE,) * 3 if self.scales is None else (self.scales.q, self.scales.k, self.scales.v)
        )
        values = {
            "gated norm's sum": gated,
            "norm's sum": added,
            "gated sum": on.add_gated(self.x, self.delta, gate),
            "rotary embedding of queries": _value(q, q_scale),
            "rotary embedding of keys": _value(k[:, :tokens], k_scale),
            "values": _value(v[:, :tokens], v_scale),
            "cross-attention's queries": cross_q,
        }
        return values | {name: _value(code) for name, code in codes.items()}


class _Products:
    """A product of quantized or BF16 linears, and the attention to what comes out. The norm before
    gives values a mean, as a model's have: attention to noise averages it away, and what is left is
    mostly the rounding of the softmax."""

    def __init__(
        self,
        device: torch.device,
        act_scale: float | None,
        scales_rows: bool,
        fp8_attention: bool,
    ) -> None:
        draw, width = _Draw(device), SMALL.width
        self._act_scale = act_scale
        self.x, self.delta = (draw(1, SMALL_TOKENS, width) for _ in range(2))
        factor, shift = (draw(1, width).float() for _ in range(2))
        self.norm = Norm(factor, shift, 1e-6, plus_one=True)
        self.q_norm = nn.RMSNorm(width, eps=1e-6).to(device, torch.bfloat16)
        self.rope = _rope(draw, SMALL_TOKENS, SMALL)
        self.linear = nn.Linear(width, 3 * width, bias=True).to(device, torch.bfloat16)
        self.linear.weight.data = draw(3 * width, width) / 16
        self.weight_scales = {"product": torch.tensor(SCALE, device=device)}
        if scales_rows:  # no two the same, and no powers of two
            rows = torch.arange(3 * width, device=device) / width
            self.weight_scales["product by rows"] = (SCALE * (1.1 + rows)).unsqueeze(1)
        self.scales = _attention_scales(fp8_attention)

    def run(self, on: Kernels) -> dict[str, Tensor]:
        normed = on.add_norm(self.x, self.delta, self.norm.factor, self.norm, self._act_scale)[1]
        products = {name: self._product(on, name)(normed) for name in self.weight_scales}
        q, k, v = on.norm_rope(
            products["product"], self.q_norm, self.q_norm, self.rope, SMALL.heads, self.scales
        )
        attended = on.attention(q, k, v, self.scales, SMALL_TOKENS)
        return products | {"attention": _value(attended)}

    def _product(self, on: Kernels, name: str) -> BlockLinear:
        if self._act_scale is None:
            return on.plain([self.linear])
        quantized = Hif8Linear.from_linear(
            self.linear,
            self.weight_scales[name],
            act_scale=torch.tensor(SCALE, device=self.x.device),
            act_policy=scale_policy("pow2"),
        )
        return on.quantized([quantized])


class _Draw:
    """Numbers that are the same on every device: shape → bf16."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator).to(self._device, torch.bfloat16)


def _rope(draw: _Draw, tokens: int, shape: BlockShape) -> Rope:
    angles = draw(1, tokens, 1, shape.width // shape.heads // 2).float()
    cos, sin = (turn(angles).repeat_interleave(2, -1) for turn in (torch.cos, torch.sin))
    return cos, sin


def _attention_scales(fp8_attention: bool) -> AttentionScales | None:
    return AttentionScales(SCALE / 2, SCALE, 2 * SCALE, SCALE) if fp8_attention else None


def _value(code: Tensor, scale: float = SCALE) -> Tensor:
    """Kernels hand on values, or multiples of the scale in 8 bits."""
    return code.float() * (scale if code.element_size() == 1 else 1.0)
