"""Round in the forward pass, and let gradients through the rounding (straight-through estimator).

The gradient of rounding is taken as 1 where a value lies within the format's range, and as 0 where
it saturates (Bengio 2013, arXiv 1308.3432; Jacob 2018, arXiv 1712.05877). Scales are constants to
the gradient: those of weights follow the weights at each step, static ones of inputs stay as
calibration has chosen them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional

from quant.errors import StudyError
from quant.studies.methods.method import InputStatistics, Method
from quant.studies.methods.operand import Operand, PerStepGroup, PerTensor, static_scale
from quant.studies.methods.registry import METHODS
from quant.studies.methods.transforms import Identity

_BEYOND = 1e30
"""Larger than what any format holds under any scale in use."""


def trainable_methods() -> tuple[str, ...]:
    """Return the names of the methods that weights can be trained under."""
    return tuple(name for name, method in METHODS.items() if _obstacle(method) is None)


def check_trainable(name: str) -> Method:
    """Return the method of this name.

    Raises:
        StudyError: there is none, or it cannot be trained; says why.
    """
    known = ", ".join(trainable_methods())
    if name not in METHODS:
        raise StudyError(f"method {name!r} is not known: take one of {known}")
    reason = _obstacle(METHODS[name])
    if reason is not None:
        raise StudyError(f"method {name!r} cannot be trained: {reason}; take one of {known}")
    return METHODS[name]


def _obstacle(method: Method) -> str | None:
    if method.rounding.needs_hessian:
        return "its weights are rounded once, in calibration"
    if method.attention is not None:
        return "it rounds attention, and only linears are trained"
    if type(method.transform) is not Identity:
        return "it changes the linears' inputs before they are rounded"
    if isinstance(method.act.granularity, PerStepGroup):
        return "its scales depend on the step, and a batch has samples of many"
    return None


@dataclass(frozen=True, slots=True)
class StaticScale:
    """A scale of inputs that calibration has chosen.

    Attributes:
        scale: [] float32.
        largest: magnitude of the format's largest value under this scale, [] float32.
    """

    scale: Tensor
    largest: Tensor

    @classmethod
    def of(cls, operand: Operand, scale: Tensor) -> StaticScale:
        """Find where an operand saturates under a scale."""
        return cls(scale, operand.format.fake_quantize(torch.full_like(scale, _BEYOND), scale))

    @classmethod
    def calibrated(cls, method: Method, statistics: InputStatistics) -> StaticScale | None:
        """Return what a method makes of a linear's statistics; None if its scales are dynamic."""
        if not isinstance(method.act.granularity, PerTensor):
            return None
        amax, binades = statistics.channels.amax(), statistics.binades.sum(0)
        return cls.of(method.act, static_scale(method.act, amax, binades))


class _Rounding(Function):
    """Rounds by an operand; the gradient passes where the value is within the range."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, operand: Operand, static: StaticScale | None) -> Tensor:
        # Scales found in x itself map its largest value into the range. Only HiF4 may clamp it, by
        # a ninth at most: its scales have 2 bits of mantissa. The gradient passes there, too.
        ctx.clips = static is not None
        if static is not None:
            ctx.save_for_backward(x.abs() <= static.largest)
        scale = None if static is None else static.scale
        return operand.round(x.float(), scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        if ctx.clips:
            (inside,) = ctx.saved_tensors
            gradient = gradient * inside
        return gradient, None, None


def round_through(x: Tensor, operand: Operand, static: StaticScale | None = None) -> Tensor:
    """Quantize and dequantize x [..., K] → [..., K], with a gradient.

    Args:
        static: the scale; None chooses scales from x by the operand's granularity.
    """
    rounded: Tensor = _Rounding.apply(x, operand, static)  # type: ignore[no-untyped-call]
    return rounded


class TrainedLinear(nn.Linear):
    """y = round(x) @ round(weight + delta)ᵀ + bias, whose rounding can be changed.

    It shares weight and bias with the linear it replaces, under the same names.

    Attributes:
        adapter: a LoRA layer of `peft`, whose product is the delta; or None.
        as_stored: round the sum of weight and delta to this dtype first, as a file would hold it.
    """

    def __init__(self, linear: nn.Linear, adapter: Any = None) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.adapter = adapter
        self.as_stored: torch.dtype | None = None
        self._method: Method | None = None
        self._act_scale: StaticScale | None = None

    def quantize_as(self, method: Method | None, act_scale: StaticScale | None = None) -> None:
        """Round by a method from now on; None rounds nothing."""
        self._method, self._act_scale = method, act_scale

    def merged_weight(self) -> Tensor:
        """Return the weight that is rounded, [N, K]: with the adapter's, if there is one."""
        if self.adapter is None:
            return self.weight
        weight: Tensor = self.weight + self.adapter.get_delta_weight("default")
        return weight if self.as_stored is None else weight.to(self.as_stored).to(weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer: x [..., K] → [..., N]."""
        weight = self.merged_weight()
        if self._method is not None:
            x = round_through(x, self._method.act, self._act_scale)
            weight = round_through(weight, self._method.weight)
        return functional.linear(x, weight, self.bias)
