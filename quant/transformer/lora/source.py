"""Name a LoRA: a file or a folder that holds one, and the scale that it is added with."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Self

import typer

from quant.errors import WeightsError
from quant.weights.weight_files import visible

Loras = Annotated[
    list[str],
    typer.Option(help="LoRA to merge into MODEL first, as PATH or PATH:SCALE; repeatable."),
]
"""The option of commands that merge LoRAs; its values are for `LoraSource.parse`."""

STEMS = ("adapter_model", "pytorch_lora_weights")
"""How PEFT and diffusers name the file in a folder."""
_PICKLES = (".bin", ".pth", ".pt", ".ckpt")


@dataclass(frozen=True, slots=True)
class LoraSource:
    """Where a LoRA is, and the factor that everything in it is multiplied by."""

    path: Path
    scale: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read PATH or PATH:SCALE; a colon that no number follows belongs to the path.

        Raises:
            WeightsError: the scale is not finite.
        """
        path, _, number = text.rpartition(":")
        if not (path and _is_number(number)):
            return cls(Path(text))
        scale = float(number)
        if not math.isfinite(scale):
            raise WeightsError(
                f"the LoRA {path} cannot have the scale {number}: give a finite number"
            )
        return cls(Path(path), scale)

    @property
    def argument(self) -> str:
        """Return what `parse` reads."""
        bare = str(self.path)
        is_plain = self.scale == 1 and not _is_number(bare.rpartition(":")[2])
        return bare if is_plain else f"{bare}:{self.scale!r}"

    def file(self) -> Path:
        """Return the file of weights: the path itself, or the one in the folder there.

        Raises:
            WeightsError: there is none, or it is a pickle.
        """
        if self.path.suffix in _PICKLES:
            raise WeightsError(
                f"the LoRA {self.path} is a pickle, which is not read, as it may run code: convert "
                "it to safetensors"
            )
        if self.path.is_file():
            return self.path
        found = visible(self.path.glob("*.safetensors"))
        named = [file for file in found if file.stem in STEMS]
        if len(named or found) != 1:
            raise WeightsError(
                f"there is no LoRA {self.path}: give a safetensors file, or a folder with one, "
                f"not with {len(named or found)}"
            )
        return (named or found)[0]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
