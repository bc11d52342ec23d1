"""Check that kernels run here and agree with plain torch, on small tensors.

The operations between a block's matrix products are compiled for a model's width, so they are
tested at that width. Attention is tested at the model's head size, with few heads. Products come
from a library and are tested in one small size.
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
from quant.numerics import hif8
from quant.numerics.int8 import token_scale
from quant.numerics.int8_linear import Int8Linear
from quant.numerics.linear import Hif8Linear
from quant.numerics.metrics import sqnr_db
from quant.numerics.scaling import scale_policy

AGREEMENT_DB = 20.0
"""Lowest SQNR of a kernel against plain torch on the same tensors, in dB.

A wrong kernel is below 5. FP8 attention, which rounds its softmax while it computes, is at 30."""

SCALE = 0.25
"""The scale of everything that is rounded in the self-test."""

SMALL_TOKENS = 1100
"""Not a multiple of any tile size."""

EVEN_TOKENS = 1000
"""Queries that fill an even number of tiles of 128; `SMALL_TOKENS` fill an odd one.

FlashAttention-3 has a kernel for either (832x480 is even, 1280x720 odd)."""

PROMPT_TOKENS = 100
"""Keys of cross-attention, whose number differs from that of the queries."""

FEW_TOKENS = (24, 32)
"""Enough where only the width matters.

Triton compiles separate code for multiples of 16, so there is one number of either kind."""


@dataclass(frozen=True, slots=True)
class BlockShape:
    """The widths of a model's blocks, for which kernels are compiled."""

    heads: int
    width: int
    ffn: int

    @property
    def head_size(self) -> int:
        return self.width // self.heads

    @classmethod
    def of(cls, config: Any) -> Self:
        """Read the shape from a `WanTransformer3DModel`'s configuration."""
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
    per_row_scales: bool = False,
    fp8_attention: bool = False,
) -> None:
    """Run every kernel on small tensors and compare it with plain torch.

    Args:
        shape: width at which width-dependent kernels are tested, on a few tokens; by default a
            small width.
        per_row_scales: also test products with a scale for each row.
        fp8_attention: also test FP8 attention.

    Raises:
        ConversionError: a kernel computes something else.
        Exception: whatever a kernel raises that does not compile or run.
    """
    act_scale = SCALE if quantized else None
    if quantized:
        _check_edges(kernels, device)
    # The blocks that a recipe protects run in BF16.
    forms = dict.fromkeys(((act_scale, fp8_attention), (None, False)))
    tests: list[_SelfTest] = [
        _OperationsTest(device, shape or SMALL, tokens, *form)
        for tokens in ((SMALL_TOKENS,) if shape is None else FEW_TOKENS)
        for form in forms
    ]
    head_size = SMALL.head_size if shape is None else shape.head_size
    tests.append(_ProductsTest(device, head_size, act_scale, per_row_scales, fp8_attention))
    for test in tests:
        _compare(test, kernels)


@torch.no_grad()
def check_int8(kernels: Kernels, device: torch.device) -> None:
    """Run an INT8 product of many tokens and one of few, and compare them with plain torch.

    Raises:
        ConversionError, Exception: as for `check_kernels`.
    """
    _compare(_Int8Test(device), kernels)


@torch.no_grad()
def check_sparse(
    kernels: Kernels, device: torch.device, block: int, shape: BlockShape | None = None
) -> None:
    """Run sparse attention over blocks of `block` tokens and compare it with its emulation.

    Raises:
        ConversionError, Exception: as for `check_kernels`.
    """
    for short in (0, block // 3 + 1):
        _compare(_SparseTest(device, block, (shape or SMALL).head_size, short), kernels)


def _compare(test: _SelfTest, kernels: Kernels) -> None:
    expected = test.run(EagerKernels())
    for name, found in test.run(kernels).items():
        agreement = sqnr_db(expected[name], found)
        if not agreement >= AGREEMENT_DB:  # true for NaN as well
            raise ConversionError(
                f"its {name} agrees with plain torch to {agreement:.0f} dB only, where "
                f"{AGREEMENT_DB:.0f} are wanted"
            )


def _check_edges(kernels: Kernels, device: torch.device) -> None:
    """Check that NaN stays NaN and that too large values saturate with their sign."""
    edges = torch.tensor([float("nan"), float("inf"), -1e30], dtype=torch.bfloat16, device=device)
    nan, high, low = _value(kernels.round_act(edges, SCALE)).tolist()
    if not (math.isnan(nan) and high >= 384 * SCALE and low == -high):
        raise ConversionError(f"its rounding makes {[nan, high, low]} of NaN, infinity and -1e30")


class _SelfTest(Protocol):
    def run(self, kernels: Kernels) -> dict[str, Tensor]:
        """Return the values that `kernels` compute, by the name of the operation."""


class _OperationsTest:
    """Runs the operations between a block's products, with quantized or BF16 output.

    They are run with every combination of arguments that a block uses.
    """

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
        self.qkv, self.ffn_hidden = draw(1, tokens, 3 * shape.width), draw(1, tokens, shape.ffn)
        self.factor, self.shift = (draw(1, shape.width).float() for _ in range(2))
        self.q_norm = nn.RMSNorm(shape.width, eps=1e-6).to(device, torch.bfloat16)
        self.rope = _rope(draw, tokens, shape)
        self.scales = _attention_scales(fp8_attention)

    def run(self, kernels: Kernels) -> dict[str, Tensor]:
        act_scale, gate = self._act_scale, self.factor
        modulated, affine = (
            Norm(self.factor, self.shift, 1e-6, plus_one=plus_one) for plus_one in (True, False)
        )
        first = kernels.add_norm(self.x, None, None, modulated, act_scale)[1]
        gated, second = kernels.add_norm(self.x, self.delta, gate, affine, act_scale)
        added, third = kernels.add_norm(self.x, self.delta, None, modulated, act_scale)
        q, k, v = kernels.norm_rope(
            self.qkv, self.q_norm, self.q_norm, self.rope, self.heads, self.scales
        )
        (cross_q,) = kernels.norm_rope(self.x, self.q_norm, None, None, self.heads, None)
        codes = {
            "first norm": first,
            "second norm": second,
            "third norm": third,
            "GELU": kernels.gelu(self.ffn_hidden, act_scale),
            "rounding": kernels.round_act(self.x, act_scale),
        }
        q_scale, k_scale, v_scale = (
            (SCALE,) * 3 if self.scales is None else (self.scales.q, self.scales.k, self.scales.v)
        )
        values = {
            "gated norm's sum": gated,
            "norm's sum": added,
            "gated sum": kernels.add_gated(self.x, self.delta, gate),
            "rotary embedding of queries": _value(q, q_scale),
            "rotary embedding of keys": _value(k, k_scale),
            "values": _value(v, v_scale),
            "cross-attention's queries": cross_q,
        }
        return values | {name: _value(code) for name, code in codes.items()}


class _ProductsTest:
    """Runs a product of quantized or BF16 linears, then self- and cross-attention on its output.

    The norm before the product gives the values a mean, as in a model. Attention to zero-mean noise
    would average the values away and leave mostly the rounding of the softmax.
    """

    def __init__(
        self,
        device: torch.device,
        head_size: int,
        act_scale: float | None,
        per_row_scales: bool,
        fp8_attention: bool,
    ) -> None:
        # Products need a width that is a multiple of 16.
        self.heads = 32 // math.gcd(head_size, 16)
        draw, shape = _Draw(device), BlockShape(self.heads, self.heads * head_size, SMALL.ffn)
        width = shape.width
        self._act_scale = act_scale
        self.x, self.delta = (draw(1, SMALL_TOKENS, width) for _ in range(2))
        factor, shift = (draw(1, width).float() for _ in range(2))
        self.norm = Norm(factor, shift, 1e-6, plus_one=True)
        self.q_norm = nn.RMSNorm(width, eps=1e-6).to(device, torch.bfloat16)
        self.rope = _rope(draw, SMALL_TOKENS, shape)
        self.linear = nn.Linear(width, 3 * width, bias=True).to(device, torch.bfloat16)
        self.linear.weight.data = draw(3 * width, width) / 16
        self.weight_scales = {"product": torch.tensor(SCALE, device=device)}
        if per_row_scales:  # all different, and no powers of two
            rows = torch.arange(3 * width, device=device) / width
            self.weight_scales["product by rows"] = (SCALE * (1.1 + rows)).unsqueeze(1)
        self.scales = _attention_scales(fp8_attention)

    def run(self, kernels: Kernels) -> dict[str, Tensor]:
        gate, act_scale = self.norm.factor, self._act_scale
        normed = kernels.add_norm(self.x, self.delta, gate, self.norm, act_scale)[1]
        products = {name: self._product(kernels, name)(normed) for name in self.weight_scales}
        q, k, v = kernels.norm_rope(
            products["product"], self.q_norm, self.q_norm, self.rope, self.heads, self.scales
        )
        few = q[:, :EVEN_TOKENS].contiguous()
        attended = kernels.attention(q, k, v, self.scales, act_scale)
        attended_even = kernels.attention(few, k, v, self.scales, act_scale)
        (cross_q,) = kernels.norm_rope(self.x, self.q_norm, None, None, self.heads, None)
        prompt = self.delta[:, :PROMPT_TOKENS].view(1, PROMPT_TOKENS, self.heads, -1)
        crossed = kernels.attention(cross_q, prompt, prompt, None, act_scale)
        return products | {
            "attention": _value(attended),
            "attention of an even number of tiles": _value(attended_even),
            "cross-attention": _value(crossed),
        }

    def _product(self, kernels: Kernels, name: str) -> BlockLinear:
        if self._act_scale is None:
            return kernels.plain([self.linear])
        quantized = Hif8Linear.from_linear(
            self.linear,
            self.weight_scales[name],
            act_scale=torch.tensor(SCALE, device=self.x.device),
            act_policy=scale_policy("pow2"),
        )
        return kernels.quantized([quantized])


class _Int8Test:
    """Runs INT8 products of many tokens and of few, with a token of zeros and outliers."""

    def __init__(self, device: torch.device) -> None:
        draw = _Draw(device)
        self.x = draw(1, SMALL_TOKENS, SMALL.width)
        self.x[0, 0] = 0
        self.x[0, 1, 7] = 1000
        self.linear = nn.Linear(SMALL.width, 3 * SMALL.width).to(device, torch.bfloat16)
        self.linear.weight.data = draw(3 * SMALL.width, SMALL.width) / 16

    def run(self, kernels: Kernels) -> dict[str, Tensor]:
        scale = token_scale(self.linear.weight.detach())
        product = kernels.int8([Int8Linear.from_linear(self.linear, scale)])
        few = self.x[:, :2]
        return {"INT8 product": product(self.x), "INT8 product of few tokens": product(few)}


class _SparseTest:
    """Runs sparse attention on a random choice of blocks, the last of which may be shorter.

    The first block of queries keeps only the last block of keys, the last one keeps all of them.
    """

    def __init__(self, device: torch.device, block: int, head_size: int, short: int) -> None:
        draw, tokens, self.block = _Draw(device), 5 * block - short, block
        self.q, self.k, self.v = (draw(1, tokens, 2, head_size) for _ in range(3))
        self.kept = draw(1, 2, 5, 5) > 0
        self.kept[:, :, 0] = False
        self.kept[..., -1] = True
        self.kept[:, :, -1] = True

    def run(self, kernels: Kernels) -> dict[str, Tensor]:
        attend = kernels.sparse_attention
        return {"sparse attention": attend(self.q, self.k, self.v, self.kept, self.block, None)}


class _Draw:
    """Draws random numbers that are the same on every device: shape → bf16."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator).to(self._device, torch.bfloat16)


def _rope(draw: _Draw, tokens: int, shape: BlockShape) -> Rope:
    angles = draw(1, tokens, 1, shape.width // shape.heads // 2).float()
    cos, sin = (function(angles).repeat_interleave(2, -1) for function in (torch.cos, torch.sin))
    return cos, sin


def _attention_scales(fp8_attention: bool) -> AttentionScales | None:
    return AttentionScales(SCALE / 2, SCALE, 2 * SCALE) if fp8_attention else None


def _value(code: Tensor, scale: float = SCALE) -> Tensor:
    """Return the values of an activation: 8-bit codes are multiplied by the scale, BF16 is not."""
    if code.dtype is torch.uint8:
        return hif8.decode(code, torch.float32) * scale
    return code.float() * (scale if code.element_size() == 1 else 1.0)
