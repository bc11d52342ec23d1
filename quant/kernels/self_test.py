"""Kernels beside plain torch, on small tensors: do they run here, and compute what they should?

What a block asks for between its products is compiled for a model's width, so it is tried in that;
products and attention are libraries' and tried in one small size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from quant.errors import ConversionError
from quant.kernels.eager import EagerKernels
from quant.kernels.interface import AttentionScales, BlockLinear, Kernels, Norm, Rope
from quant.numerics.linear import Hif8Linear
from quant.numerics.metrics import sqnr_db
from quant.numerics.scaling import scale_policy

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
        shape: what is compiled for a width is tried in this one, on a few tokens; by default in a
            small one.

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
