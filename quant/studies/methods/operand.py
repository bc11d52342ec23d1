"""Say how an operand of a product is quantized: format, granularity and the rule for scales."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from quant.numerics.scaling import ScalePolicy, binade_histogram, choose_scale
from quant.studies.methods.formats import Format


@dataclass(frozen=True, slots=True)
class PerTensor:
    """One scale for all: of a weight from itself, of an input from calibration (static)."""

    label: ClassVar[str] = "tensor"
    reads: ClassVar[int] = 1

    def scales(self, rows: int, width: int) -> int:
        """Return how many scales a matrix has."""
        del rows, width
        return 1


@dataclass(frozen=True, slots=True)
class PerStepGroup:
    """Inputs only: a static scale for each of some groups of denoising steps.

    Attributes:
        groups: at most so many, of neighbouring recorded steps.
    """

    groups: int = 4
    label: ClassVar[str] = "step group"
    reads: ClassVar[int] = 1

    def scales(self, rows: int, width: int) -> int:
        """Return how many scales a matrix has."""
        del rows, width
        return self.groups


@dataclass(frozen=True, slots=True)
class PerRow:
    """A scale for each row: of a weight's channel, or of a token when the model runs (dynamic)."""

    label: ClassVar[str] = "row"
    reads: ClassVar[int] = 2

    def scales(self, rows: int, width: int) -> int:
        """Return how many scales a matrix has."""
        del width
        return rows


@dataclass(frozen=True, slots=True)
class PerGroup:
    """A scale for each group of neighbours in a row, of tokens when the model runs (dynamic).

    Attributes:
        size: values of a group; a row's last one may have fewer.
    """

    size: int = 128
    reads: ClassVar[int] = 2

    @property
    def label(self) -> str:
        """Its name in tables."""
        return f"group of {self.size}"

    def scales(self, rows: int, width: int) -> int:
        """Return how many scales a matrix has."""
        return int(rows * -(-width // self.size))


@dataclass(frozen=True, slots=True)
class OwnScales:
    """The scales that the format itself holds, of inputs found when the model runs (dynamic)."""

    label: ClassVar[str] = "its own groups"
    reads: ClassVar[int] = 2

    def scales(self, rows: int, width: int) -> int:
        """Return how many scales a matrix has beside the format's."""
        del rows, width
        return 0


Granularity = PerTensor | PerStepGroup | PerRow | PerGroup | OwnScales


@dataclass(frozen=True, slots=True)
class Operand:
    """How weights, or inputs, are quantized.

    Attributes:
        rule: how scales are chosen; None for the format's own.
    """

    format: Format
    granularity: Granularity
    rule: ScalePolicy | None = None

    @property
    def policy(self) -> ScalePolicy:
        """The rule for scales."""
        return self.rule or self.format.policy

    @property
    def is_static(self) -> bool:
        """Whether scales of inputs are known before the model runs."""
        return isinstance(self.granularity, PerTensor | PerStepGroup)

    @property
    def label(self) -> str:
        """Its name in tables."""
        if self.policy.name == "none" and not isinstance(self.granularity, OwnScales):
            return f"{self.format.name} as it is"
        rule = "" if self.rule is None else f", {self.rule.name}"
        return f"{self.format.name} per {self.granularity.label}{rule}"

    def round(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """Quantize and dequantize x [..., K] → [..., K] float32.

        Args:
            scale: broadcastable to x; None chooses it from x itself by the granularity.
        """
        if scale is not None:
            return self.format.fake_quantize(x, scale)
        if not isinstance(self.granularity, PerGroup):
            return self.format.fake_quantize(x, self.scale_of(x))
        width = x.shape[-1]
        size = min(self.granularity.size, width)
        padded = functional.pad(x, (0, -width % size))
        groups = padded.reshape(*x.shape[:-1], -1, size)
        return self.format.fake_quantize(groups, self._by_last(groups)).flatten(-2)[..., :width]

    def scale_of(self, x: Tensor) -> Tensor:
        """Choose the scale of a whole tensor, [], or of each row, [..., 1], from x [..., K]."""
        assert not isinstance(self.granularity, PerGroup), "groups are made by `round`"
        if isinstance(self.granularity, PerRow):
            return self._by_last(x)
        return self._by_last(x.reshape(1, -1)).reshape(())

    def _by_last(self, x: Tensor) -> Tensor:
        binades = None
        if self.policy.needs_binades:
            counts = binade_histogram(x.reshape(-1, x.shape[-1]))
            binades = counts.reshape(*x.shape[:-1], 1, -1)
        return choose_scale(self.policy, x.abs().amax(-1, keepdim=True), binades)

    def weight_bytes(self, rows: int, width: int) -> float:
        """Return the bytes of a weight [rows, width] with its scales, two bytes each."""
        scales = 0 if self.policy.name == "none" else self.granularity.scales(rows, width)
        return rows * width * self.format.bits / 8 + 2 * scales


def step_group(step: int, recorded: tuple[int, ...], groups: int) -> int:
    """Return the group of a denoising step: recorded steps are divided in order, evenly.

    A step that was not recorded belongs to the nearest one that was.
    """
    nearest = min(range(len(recorded)), key=lambda place: (abs(recorded[place] - step), place))
    return nearest * min(groups, len(recorded)) // len(recorded)


def static_scale(operand: Operand, amax: Tensor, binades: Tensor) -> Tensor:
    """Choose a scale from what calibration has seen: amax [...], binades [..., NUM_BINADES]."""
    return choose_scale(operand.policy, amax, binades).to(torch.float32)
