"""Define a method as data, and a linear that computes as a method says."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from quant.studies.methods.formats import BF16, Format
from quant.studies.methods.operand import (
    Operand,
    PerGroup,
    PerStepGroup,
    PerTensor,
    static_scale,
    step_group,
)
from quant.studies.methods.rounding import Nearest, Rounding
from quant.studies.methods.transforms import Identity, SmoothQuant


@dataclass(frozen=True, slots=True)
class Method:
    """A way to quantize.

    Attributes:
        summary: a sentence for people.
        source: the paper or code it is from.
        attention: what q, k and v of self-attention are rounded to; None leaves them.
    """

    name: str
    summary: str
    source: str
    weight: Operand
    act: Operand
    rounding: Rounding = field(default_factory=Nearest)
    transform: Identity = field(default_factory=Identity)
    attention: Format | None = None

    def __post_init__(self) -> None:
        """Refuse combinations that have no meaning here."""
        smooths = isinstance(self.transform, SmoothQuant)
        assert not isinstance(self.weight.granularity, PerStepGroup), "weights know no steps"
        assert not (self.rounding.needs_hessian and smooths), "the Hessian is of other inputs"
        assert not (self.rounding.needs_hessian and isinstance(self.weight.granularity, PerGroup))
        assert not (smooths and isinstance(self.act.granularity, PerStepGroup))
        assert not (smooths and self.act.policy.needs_binades), "binades are of other inputs"

    @property
    def is_calibrated(self) -> bool:
        """Whether calibration has to run before the method can be used."""
        needs_scale = self.act.is_static and self.act.policy.name != "none"
        smooths = isinstance(self.transform, SmoothQuant)
        return needs_scale or smooths or self.rounding.needs_hessian


@dataclass(frozen=True, slots=True)
class InputStatistics:
    """What calibration has seen of a linear's input.

    Attributes:
        channels: largest magnitude of each channel, [K].
        steps: largest magnitude at each recorded step, [steps].
        binades: histograms at each recorded step, [steps, NUM_BINADES].
    """

    channels: Tensor
    steps: Tensor
    binades: Tensor


@dataclass(frozen=True, slots=True)
class PreparedLinear:
    """A linear whose weights a method has rounded, for any points.

    Attributes:
        rounded: [N, K] float32, rounded.
        weight: [N, K], unchanged, for channels that stay in BF16.
        divisors: [K], or None.
    """

    method: Method
    rounded: Tensor
    weight: Tensor
    bias: Tensor | None
    divisors: Tensor | None
    statistics: InputStatistics

    @classmethod
    def of(
        cls,
        method: Method,
        linear: nn.Linear,
        statistics: InputStatistics,
        codes: Tensor | None = None,
    ) -> PreparedLinear:
        """Round a linear's weights.

        Args:
            codes: the weights as calibration has rounded them, before their scale, for methods
                that round there.
        """
        weight = linear.weight.detach().float()
        divisors = method.transform.divisors(weight, statistics.channels)
        if codes is None:
            scaled = weight if divisors is None else weight * divisors
            rounded = method.rounding.round(scaled, method.weight, None)
        else:
            rounded = codes.float() * method.weight.scale_of(weight)
        return cls(method, rounded, weight, linear.bias, divisors, statistics)

    def at(self, steps: tuple[int, ...], recorded: tuple[int, ...]) -> MethodLinear:
        """Return the linear for a batch of points.

        Args:
            steps: the denoising step of each sample.
            recorded: the steps that calibration has seen.
        """
        return MethodLinear(self, self._act_scale(steps, recorded))

    def _act_scale(self, steps: tuple[int, ...], recorded: tuple[int, ...]) -> Tensor | None:
        """Return the static scale, [] or one of each sample, [B, 1, 1]; None if dynamic."""
        act, seen = self.method.act, self.statistics
        if isinstance(act.granularity, PerTensor):
            channels = seen.channels if self.divisors is None else seen.channels / self.divisors
            return static_scale(act, channels.amax(), seen.binades.sum(0))
        if not isinstance(act.granularity, PerStepGroup):
            return None
        groups = [step_group(step, recorded, act.granularity.groups) for step in recorded]
        scales = {
            group: static_scale(
                act,
                seen.steps[[each == group for each in groups]].amax(),
                seen.binades[[each == group for each in groups]].sum(0),
            )
            for group in set(groups)
        }
        chosen = [scales[step_group(step, recorded, act.granularity.groups)] for step in steps]
        return torch.stack(chosen).reshape(-1, 1, 1)


class MethodLinear(nn.Module):
    """y = round(x / divisors) @ roundedᵀ + bias, with the channels kept in BF16 added exactly."""

    def __init__(self, prepared: PreparedLinear, act_scale: Tensor | None) -> None:
        super().__init__()
        self._prepared = prepared
        self._act_scale = act_scale

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer: x [B, S, K] float32 → [B, S, N] float32."""
        prepared = self._prepared
        if prepared.divisors is not None:
            x = x / prepared.divisors
        kept = prepared.method.transform.kept(x)
        low = x if kept is None else x.masked_fill(kept, 0)
        rounded = prepared.method.act.round(low, self._act_scale)
        y = functional.linear(rounded, prepared.rounded, prepared.bias)
        if kept is not None:
            high = BF16.fake_quantize(x, x).masked_fill(~kept, 0)
            y = y + functional.linear(high, prepared.weight)
        return y


def weight_bytes(method: Method, shapes: Iterable[tuple[int, int]]) -> int:
    """Return the bytes that linears of these shapes [N, K] take, with scales; biases left out."""
    total = 0.0
    for rows, width in shapes:
        total += method.weight.weight_bytes(rows, width)
        total += rows * width * method.transform.bytes_per_weight
    return round(total)


def input_reads(method: Method) -> int:
    """Return how often an input is read before its product: to find its scale, and to round it."""
    return method.act.granularity.reads + method.transform.reads
