"""Find the tensor of a transformer that a LoRA's tensor changes, whatever tool has named it.

A name has up to three parts: a prefix, the name of a module, and what the tensor is to it. Modules
are named as diffusers does or as Wan's authors do. Kohya's and musubi's tools write these names
with underscores for dots.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from quant.transformer.import_original import diffusers_name, original_name

Part = Literal["down", "up", "alpha", "diff"]
"""Factors of a product, [rank, in] and [out, rank]; the product's multiplier times the rank; or the
whole change."""

_PREFIXES = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.")
_UNDERSCORED = re.compile(r"lora_(?:unet|transformer)_+(.+)")
_LOW_RANK = re.compile(
    r"(.+?)\.(?:(lora_A|lora_down|lora\.down)|lora_B|lora_up|lora\.up)"
    r"(?:\.[^.]+)?\.weight"
)
_OTHER = re.compile(r"(.+)\.(alpha|diff|diff_b|diff_m)")
_PARAMETERS = {"alpha": "weight", "diff": "weight", "diff_b": "bias", "diff_m": "modulation"}


@dataclass(frozen=True, slots=True)
class Place:
    """What a LoRA's tensor is for.

    Attributes:
        target: the tensor that it changes, by its name in diffusers.
        module: as the LoRA names it, without its prefix.
    """

    target: str
    part: Part
    module: str


class TargetNames:
    """The names of a transformer's tensors, in every form that LoRAs have them."""

    def __init__(self, known: Collection[str]) -> None:
        """Prepare to look names up; `known` are the transformer's, as in diffusers."""
        self._known = known
        self._underscored = {
            each.replace(".", "_"): name
            for name in known
            for each in (name, original_name(name))
            if each is not None
        }

    def find(self, name: str) -> Place | None:
        """Return what a tensor is for; None if it is not known, or its module is not."""
        if match := _LOW_RANK.fullmatch(name):
            module, parameter = match[1], "weight"
            part: Part = "down" if match[2] else "up"
        elif match := _OTHER.fullmatch(name):
            module, parameter = match[1], _PARAMETERS[match[2]]
            part = "alpha" if match[2] == "alpha" else "diff"
        else:
            return None
        underscored = _UNDERSCORED.fullmatch(module)
        if underscored is not None:
            joined = self._underscored.get(f"{underscored[1]}.{parameter}".replace(".", "_"))
            return None if joined is None else Place(joined, part, underscored[1])
        for prefix in _PREFIXES:
            module = module.removeprefix(prefix)
        # A tensor that is no module's weight may also be named itself: blocks.0.modulation.diff
        for full in (f"{module}.{parameter}", module):
            for target in (full, diffusers_name(full)):
                if target is not None and target in self._known:
                    return Place(target, part, module)
        return None
