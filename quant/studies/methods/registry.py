"""List the methods that can be compared."""

from __future__ import annotations

from collections.abc import Sequence

from quant.errors import StudyError
from quant.numerics.scaling import scale_policy
from quant.studies.methods.formats import BF16, E4M3, E5M2, HIF4, HIF8, INT4, INT8
from quant.studies.methods.method import Method
from quant.studies.methods.operand import (
    Operand,
    OwnScales,
    PerGroup,
    PerRow,
    PerStepGroup,
    PerTensor,
)
from quant.studies.methods.rounding import Gptq
from quant.studies.methods.transforms import OutlierColumns, SmoothQuant

_TENSOR, _ROW, _GROUP, _STEPS = PerTensor(), PerRow(), PerGroup(), PerStepGroup()
_EXACT = Operand(BF16, _TENSOR)
_HIF8 = Operand(HIF8, _TENSOR)
_INT8_CHANNEL, _INT8_TOKEN = Operand(INT8, _ROW), Operand(INT8, _ROW)

OURS = "hif8"
"""The method that the others are compared with."""


def _hif8_rule(name: str, summary: str, source: str) -> Method:
    operand = Operand(HIF8, _TENSOR, scale_policy(name))
    return Method(f"hif8-{name}", f"HiF8, {summary}.", source, operand, operand)


_ALL = (
    Method("bf16", "Inputs and weights in BF16: the floor.", "the model itself", _EXACT, _EXACT),
    Method(
        OURS,
        "HiF8 per tensor with static scales, powers of two: this project's.",
        "arXiv 2606.00957; the scale rule is ours",
        _HIF8,
        _HIF8,
    ),
    _hif8_rule("sqnr", "the power of two with the least error on a histogram", "ours"),
    _hif8_rule("amax15", "amax at 15", "MindSpeed, forward pass"),
    _hif8_rule("amax224", "amax at 224", "MindSpeed, gradients"),
    _hif8_rule("none", "values cast without a scale", "HiFloat8, arXiv 2409.16626"),
    Method(
        "hif8-per-token",
        "HiF8 with a scale for each channel and each token.",
        "per-token scales as in ZeroQuant, arXiv 2206.01861",
        Operand(HIF8, _ROW),
        Operand(HIF8, _ROW),
    ),
    Method(
        "hif8-steps",
        "HiF8 with static scales for each of four groups of denoising steps.",
        "the idea of Q-Diffusion, arXiv 2302.04304",
        _HIF8,
        Operand(HIF8, _STEPS),
    ),
    Method(
        "hif8-smooth",
        "HiF8 per tensor after SmoothQuant with alpha 0.5.",
        "SmoothQuant, arXiv 2211.10438",
        _HIF8,
        _HIF8,
        transform=SmoothQuant(),
    ),
    Method(
        "hif8-gptq",
        "HiF8 per tensor, weights rounded by GPTQ.",
        "GPTQ, arXiv 2210.17323",
        _HIF8,
        _HIF8,
        rounding=Gptq(),
    ),
    Method(
        "int8-static",
        "INT8, a scale for each channel of weights and one static scale of inputs.",
        "Jacob et al., arXiv 1712.05877",
        _INT8_CHANNEL,
        Operand(INT8, _TENSOR),
    ),
    Method(
        "int8-steps",
        "INT8 with static scales for each of four groups of denoising steps.",
        "the idea of Q-Diffusion, arXiv 2302.04304",
        _INT8_CHANNEL,
        Operand(INT8, _STEPS),
    ),
    Method(
        "int8-per-token",
        "INT8 with a scale for each channel and each token.",
        "ZeroQuant, arXiv 2206.01861",
        _INT8_CHANNEL,
        _INT8_TOKEN,
    ),
    Method(
        "int8-smooth",
        "INT8, static, after SmoothQuant with alpha 0.5.",
        "SmoothQuant, arXiv 2211.10438",
        _INT8_CHANNEL,
        Operand(INT8, _TENSOR),
        transform=SmoothQuant(),
    ),
    Method(
        "int8-gptq",
        "INT8 per token, weights rounded by GPTQ.",
        "GPTQ, arXiv 2210.17323",
        _INT8_CHANNEL,
        _INT8_TOKEN,
        rounding=Gptq(),
    ),
    Method(
        "int8-outliers",
        "INT8 per token; channels with inputs from 6.0 on stay in BF16.",
        "LLM.int8(), arXiv 2208.07339",
        _INT8_CHANNEL,
        _INT8_TOKEN,
        transform=OutlierColumns(),
    ),
    Method(
        "int8-groups",
        "INT8 with a scale for each 128 weights and each 128 values of a token.",
        "Q-DiT, arXiv 2406.17343, without its search for group sizes",
        Operand(INT8, _GROUP),
        Operand(INT8, _GROUP),
    ),
    Method(
        "e4m3",
        "E4M3 per tensor with static scales.",
        "FP8 formats, arXiv 2209.05433",
        Operand(E4M3, _TENSOR),
        Operand(E4M3, _TENSOR),
    ),
    Method(
        "e4m3-per-token",
        "E4M3 with a scale for each channel and each token.",
        "FP8 formats, arXiv 2209.05433",
        Operand(E4M3, _ROW),
        Operand(E4M3, _ROW),
    ),
    Method(
        "e5m2",
        "E5M2 per tensor with static scales.",
        "FP8 formats, arXiv 2209.05433",
        Operand(E5M2, _TENSOR),
        Operand(E5M2, _TENSOR),
    ),
    Method(
        "hif4",
        "HiF4-like weights and inputs, in groups of 64 with their own scales.",
        "HiFloat4 as public code has it; our reading",
        Operand(HIF4, OwnScales()),
        Operand(HIF4, OwnScales()),
    ),
    Method(
        "int4-per-token",
        "INT4 with a scale for each channel and each token.",
        "ZeroQuant, arXiv 2206.01861",
        Operand(INT4, _ROW),
        Operand(INT4, _ROW),
    ),
    Method(
        "int4-groups",
        "INT4 weights in groups of 128, INT8 inputs in groups of 128.",
        "Q-DiT, arXiv 2406.17343, symmetric and without its search for group sizes",
        Operand(INT4, _GROUP),
        Operand(INT8, _GROUP),
    ),
    Method(
        "attention-hif8",
        "Only q, k and v of self-attention in HiF8; linears in BF16.",
        "this project's format in attention",
        _EXACT,
        _EXACT,
        attention=HIF8,
    ),
    Method(
        "attention-e4m3",
        "Only q, k and v of self-attention in E4M3; linears in BF16.",
        "FlashAttention-3, arXiv 2407.08608, without its rotation",
        _EXACT,
        _EXACT,
        attention=E4M3,
    ),
    Method(
        "hif8-attention-hif8",
        "HiF8 per tensor, and q, k and v of self-attention in HiF8.",
        "this project's format everywhere",
        _HIF8,
        _HIF8,
        attention=HIF8,
    ),
)

METHODS = {method.name: method for method in _ALL}
"""All methods by name, in the order of tables."""


def chosen_methods(names: str) -> tuple[Method, ...]:
    """Return the methods of a list like "hif8,int8-static", or all for "all"; ours comes along.

    Raises:
        StudyError: one is not known.
    """
    wanted: Sequence[str] = [each.strip() for each in names.split(",") if each.strip()]
    unknown = [each for each in wanted if each not in METHODS and each != "all"]
    if unknown or not wanted:
        raise StudyError(
            f"method {(unknown or [names])[0]!r} is not one of all, {', '.join(METHODS)}"
        )
    return tuple(
        each for name, each in METHODS.items() if name in {*wanted, OURS} or "all" in wanted
    )
