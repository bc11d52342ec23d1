"""Read what PEFT and diffusers keep of a LoRA beside its tensors: how its products are scaled.

PEFT writes adapter_config.json beside adapter_model.safetensors. diffusers writes the same keys
into the metadata of its file, behind the component's name. Others write a tensor for each alpha.
Each library reads its own place only, so a LoRA whose places contradict each other is refused.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quant.errors import WeightsError
from quant.transformer.lora.source import STEMS
from quant.weights.model_folder import read_object
from quant.weights.weight_files import visible

_FILE = "adapter_config.json"
_METADATA = "lora_adapter_metadata"
_COMPONENT = "transformer."
_KEYS = {
    "alpha": "lora_alpha",
    "alphas": "alpha_pattern",
    "by_root": "use_rslora",
    "rank": "r",
    "ranks": "rank_pattern",
}
"""The files' names of what is read."""


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """How products are scaled that have no alpha of their own.

    Attributes:
        alpha: None where nothing says it: it is then the rank.
        alphas: other alphas, by a pattern of the module's name.
        by_root: whether alpha is divided by the root of the rank, as in rsLoRA.
        rank: None where nothing says it.
        ranks: other ranks, by a pattern of the module's name.
    """

    alpha: float | None = None
    alphas: Mapping[str, float] = field(default_factory=dict)
    by_root: bool = False
    rank: float | None = None
    ranks: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def read(cls, file: Path, metadata: Mapping[str, str]) -> AdapterConfig:
        """Read it for a file of weights with this metadata.

        Raises:
            WeightsError: it cannot be read, has an alpha or rank that is no number, may be of
                another file in the folder, or differs between the metadata and the file beside.
        """
        beside = file.with_name(_FILE)
        try:
            inside = outside = None
            if _METADATA in metadata:
                inside = cls._of(json.loads(metadata[_METADATA]))
            if beside.is_file() and _is_of(file, needed=inside is None):
                outside = cls._of(read_object(beside))
            if inside is not None and outside is not None:
                _refuse_contradiction(file, inside, outside)
            return inside or outside or cls()
        except (ValueError, TypeError, AttributeError, RecursionError, re.error) as error:
            raise WeightsError(
                f"the configuration of the LoRA {file} cannot be read: {error}; copy it again, or "
                f"remove {_FILE} if it is of something else"
            ) from error

    @classmethod
    def _of(cls, found: Mapping[str, Any]) -> AdapterConfig | None:
        """Parse what one place says; None if it says nothing of this component."""
        values = {key.removeprefix(_COMPONENT): value for key, value in found.items()}
        if values.keys().isdisjoint(_KEYS.values()):
            return None
        return cls(
            _optional_number(values.get("lora_alpha")),
            _by_pattern(values.get("alpha_pattern")),
            bool(values.get("use_rslora")),
            _optional_number(values.get("r")),
            _by_pattern(values.get("rank_pattern")),
        )

    def rank_of(self, module: str) -> float | None:
        """Return the rank that a module's factors must have; None where nothing says it."""
        return _matching(self.ranks, module, self.rank)

    def factor(self, module: str, rank: int) -> float | None:
        """Return what the product of a module's two factors is multiplied by; None if not said."""
        alpha = _matching(self.alphas, module, self.alpha)
        if alpha is None:
            return None
        return alpha / (math.sqrt(rank) if self.by_root else rank)


def _refuse_contradiction(file: Path, inside: AdapterConfig, outside: AdapterConfig) -> None:
    """Refuse two configurations that scale differently: which one counts depends on the library.

    Ranks are those of the tensors in any case, so one that only one place states is no difference.
    """
    for name, key in _KEYS.items():
        values = [getattr(each, name) for each in (inside, outside)]
        stated = all(values) or name not in {"rank", "ranks"}
        if stated and values[0] != values[1]:
            shown = [json.dumps(_whole(each) or None) for each in values]
            raise WeightsError(
                f"the LoRA {file} has {key} = {shown[0]} in its metadata, which diffusers reads, "
                f"and {shown[1]} in {_FILE} beside it, which PEFT reads: give it a folder of its "
                f"own, without the {_FILE} if the metadata is right"
            )


def _whole(value: Any) -> Any:
    """Return numbers without a fraction as files write them."""
    if isinstance(value, Mapping):
        return {key: _whole(each) for key, each in value.items()}
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _is_of(file: Path, *, needed: bool) -> bool:
    """Return whether the configuration beside a file is of this file.

    Raises:
        WeightsError: it cannot be told, and nothing else says it (`needed`).
    """
    stems = {each.stem for each in visible(file.parent.glob("*.safetensors"))}
    if file.stem in STEMS or len(stems) == 1:
        return True
    if needed and stems.isdisjoint(STEMS):
        raise WeightsError(
            f"it cannot be told whether {file.parent / _FILE} is of the LoRA {file.name} or of "
            f"another of the {len(stems)} files there: give each a folder of its own"
        )
    return False


def _matching(patterns: Mapping[str, float], module: str, usual: float | None) -> float | None:
    found = (key for key in patterns if re.fullmatch(rf"(.*\.)?({key})", module))
    key = next(found, None)
    return usual if key is None else patterns[key]


def _by_pattern(values: Mapping[str, Any] | None) -> dict[str, float]:
    return {
        re.compile(key.removeprefix(_COMPONENT)).pattern: _number(value)
        for key, value in (values or {}).items()
    }


def _optional_number(value: Any) -> float | None:
    return None if value is None else _number(value)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{value!r} is not a finite number")
    return float(value)
