"""Read what PEFT and diffusers keep of a LoRA beside its tensors: how its products are scaled.

PEFT writes adapter_config.json beside adapter_model.safetensors. diffusers writes the same keys
into the metadata of its file, behind the component's name. Others write a tensor for each alpha.
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


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """How products are scaled that have no alpha of their own.

    Attributes:
        alpha: None where nothing says it: it is then the rank.
        patterns: other alphas, by a pattern of the module's name.
        by_root: whether alpha is divided by the root of the rank, as in rsLoRA.
    """

    alpha: float | None = None
    patterns: Mapping[str, float] = field(default_factory=dict)
    by_root: bool = False

    @classmethod
    def read(cls, file: Path, metadata: Mapping[str, str]) -> AdapterConfig:
        """Read it for a file of weights with this metadata.

        Raises:
            WeightsError: it cannot be read, has an alpha that is no number, or may be of another
                file in the folder.
        """
        beside = file.with_name(_FILE)
        try:
            if _METADATA in metadata:
                values = json.loads(metadata[_METADATA])
            elif beside.is_file() and _is_of(file):
                values = read_object(beside)
            else:
                return cls()
            values = {key.removeprefix(_COMPONENT): value for key, value in values.items()}
            patterns = {
                re.compile(key.removeprefix(_COMPONENT)).pattern: _number(value)
                for key, value in (values.get("alpha_pattern") or {}).items()
            }
            alpha = values.get("lora_alpha")
            return cls(
                None if alpha is None else _number(alpha),
                patterns,
                bool(values.get("use_rslora")),
            )
        except (ValueError, TypeError, AttributeError, RecursionError, re.error) as error:
            raise WeightsError(
                f"the configuration of the LoRA {file} cannot be read: {error}; copy it again"
            ) from error

    def factor(self, module: str, rank: int) -> float:
        """Return what the product of a module's two factors is multiplied by."""
        matching = (key for key in self.patterns if re.fullmatch(rf"(.*\.)?({key})", module))
        key = next(matching, None)
        alpha = self.alpha if key is None else self.patterns[key]
        if alpha is None:
            return 1.0
        return alpha / (math.sqrt(rank) if self.by_root else rank)


def _is_of(file: Path) -> bool:
    """Return whether the configuration beside a file is of this file."""
    stems = {each.stem for each in visible(file.parent.glob("*.safetensors"))}
    if file.stem in STEMS or len(stems) == 1:
        return True
    if stems.isdisjoint(STEMS):
        raise WeightsError(
            f"it cannot be told whether {file.parent / _FILE} is of the LoRA {file.name} or of "
            f"another of the {len(stems)} files there: give each a folder of its own"
        )
    return False


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{value!r} is not a finite number")
    return float(value)
