"""Define granularities: how many values share a scale, and the shape of the scale for x."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, TypeVar

from quant.errors import RecipeError


@dataclass(frozen=True, slots=True)
class PerTensor:
    """One scale for the whole tensor: x [...] → scale []. Weights and static activations."""

    name: ClassVar[str] = "per_tensor"


@dataclass(frozen=True, slots=True)
class PerChannel:
    """One scale per output channel of a linear: weight [N, K] → scale [N, 1]. Weights only."""

    name: ClassVar[str] = "per_channel"


@dataclass(frozen=True, slots=True)
class PerToken:
    """One scale per token, chosen at run time: x [..., K] → scale [..., 1]. Activations only."""

    name: ClassVar[str] = "per_token"


WeightGranularity = PerTensor | PerChannel
ActGranularity = PerTensor | PerToken

G = TypeVar("G")

_WEIGHT: dict[str, WeightGranularity] = {PerTensor.name: PerTensor(), PerChannel.name: PerChannel()}
_ACT: dict[str, ActGranularity] = {PerTensor.name: PerTensor(), PerToken.name: PerToken()}


def weight_granularity(name: str) -> WeightGranularity:
    """Return the weight granularity with this name.

    Raises:
        RecipeError: there is none for weights with this name.
    """
    return _named(name, _WEIGHT, "weight")


def act_granularity(name: str) -> ActGranularity:
    """Return the activation granularity with this name.

    Raises:
        RecipeError: there is none for activations with this name.
    """
    return _named(name, _ACT, "act")


def _named(name: str, known: dict[str, G], what: str) -> G:
    if name not in known:
        raise RecipeError(f"{what} granularity {name!r} is not one of {', '.join(known)}")
    return known[name]
