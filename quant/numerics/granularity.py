"""How many values share one scale. Each type says which shape of scale belongs to x."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, TypeVar

from quant.errors import RecipeError


@dataclass(frozen=True, slots=True)
class PerTensor:
    """One scale for the whole tensor: x [...] → scale []. Weights, and activations (static)."""

    name: ClassVar[str] = "per_tensor"


@dataclass(frozen=True, slots=True)
class PerChannel:
    """One scale per output channel of a linear: weight [N, K] → scale [N, 1]. Weights only."""

    name: ClassVar[str] = "per_channel"


@dataclass(frozen=True, slots=True)
class PerToken:
    """One scale per token, found while running: x [..., K] → scale [..., 1]. Activations only."""

    name: ClassVar[str] = "per_token"


WeightGranularity = PerTensor | PerChannel
ActGranularity = PerTensor | PerToken

G = TypeVar("G")

_WEIGHT: dict[str, WeightGranularity] = {PerTensor.name: PerTensor(), PerChannel.name: PerChannel()}
_ACT: dict[str, ActGranularity] = {PerTensor.name: PerTensor(), PerToken.name: PerToken()}


def weight_granularity(name: str) -> WeightGranularity:
    """The weight granularity called `name`.

    Raises:
        RecipeError: there is none of that name for weights.
    """
    return _named(name, _WEIGHT, "weight")


def act_granularity(name: str) -> ActGranularity:
    """The activation granularity called `name`.

    Raises:
        RecipeError: there is none of that name for activations.
    """
    return _named(name, _ACT, "act")


def _named(name: str, known: dict[str, G], what: str) -> G:
    if name not in known:
        raise RecipeError(f"{what} granularity {name!r} is not one of {', '.join(known)}")
    return known[name]
