"""Merge LoRAs into the weights of a transformer, in float32, rounded once to what the weights are.

All LoRAs of a set are added up before the result is rounded. Sums are computed where the weights
are; devices may differ in the last bit before rounding.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from quant.transformer.lora.read import Lora, read_lora
from quant.transformer.lora.source import LoraSource
from quant.transformer.meta_model import shared_meta_model
from quant.weights.fingerprint import read_transformer_config, with_loras

_SHARED_INPUT = (
    re.compile(r"(.+\.attn1\.to_)[qkv](\.\w+)"),
    re.compile(r"(.+\.attn2\.to_)[kv](\.\w+)"),
)
"""Linears that kernels join to one, so that they belong to one tree or to all (`JoinedLinear`)."""


@dataclass(frozen=True, slots=True)
class LoraSet:
    """The LoRAs of one mode, in the order in which they are added; perhaps none.

    Attributes:
        names: of the tensors that a transformer with these LoRAs does not share with one without:
            those that are changed, and those that kernels join with them.
    """

    loras: tuple[Lora, ...] = ()
    names: frozenset[str] = frozenset()

    @property
    def changed(self) -> frozenset[str]:
        """Return the names of the tensors that are changed."""
        return frozenset(name for lora in self.loras for name in lora.updates)

    @property
    def digest(self) -> str | None:
        """Return what identifies the LoRAs with their scales; None if there are none."""
        if not self.loras:
            return None
        return hashlib.sha256("\n".join(each.digest for each in self.loras).encode()).hexdigest()

    @property
    def arguments(self) -> tuple[str, ...]:
        """Return the values of `--lora` that name these LoRAs."""
        return tuple(each.source.argument for each in self.loras)

    def fingerprint(self, model_fingerprint: str) -> str:
        """Return the fingerprint of a model with these LoRAs merged."""
        return with_loras(model_fingerprint, self.digest)

    @torch.no_grad()
    def merged(self, name: str, weight: Tensor) -> Tensor:
        """Return a tensor with all changes added, in its own dtype; itself if none changes it.

        Raises:
            WeightsError: a LoRA's file cannot be read or has become shorter.
        """
        changes = [
            (update, lora.source.scale)
            for lora in self.loras
            for update in lora.updates.get(name, ())
        ]
        if not changes:
            return weight
        total = weight.detach().to(torch.float32, copy=True).contiguous()
        for update, scale in changes:
            update.add_to(total, scale)
        return total.to(weight.dtype)

    @torch.no_grad()
    def merge(self, source: nn.Module, target: nn.Module | None = None) -> None:
        """Merge into a transformer whose weights are loaded.

        Args:
            source: the transformer; it is not changed, unless it is the target as well.
            target: a tree whose tensors `names` are on the meta device, to be made here
                (`quant.transformer.module_tree.share_except`); by default `source` itself.

        Raises:
            WeightsError: a LoRA's file cannot be read or has become shorter.
        """
        for name in sorted(self.names):
            weight = source.get_parameter(name)
            merged = self.merged(name, weight)
            if target is None or target is source:
                weight.copy_(merged)
                continue
            module, _, own = name.rpartition(".")
            made = merged.clone() if merged is weight else merged
            new = nn.Parameter(made, requires_grad=weight.requires_grad)
            target.get_submodule(module).register_parameter(own, new)


NO_LORAS = LoraSet()
"""What a mode without LoRAs has."""


def read_loras(model_folder: Path, sources: Iterable[LoraSource]) -> LoraSet:
    """Read and check the LoRAs to merge into a model's transformer; no weights of it are read.

    Raises:
        WeightsError: as for `read_lora`.
        QuantError: the transformer's configuration cannot be read.
    """
    sources = tuple(sources)
    if not sources:
        return NO_LORAS
    required = shared_meta_model(read_transformer_config(model_folder)).state_dict()
    loras = tuple(read_lora(source, required) for source in sources)
    changed = {name for lora in loras for name in lora.updates}
    return LoraSet(loras, frozenset(changed | _joined_with(changed, required)))


def _joined_with(changed: Iterable[str], known: Iterable[str]) -> set[str]:
    """Return the tensors of linears that kernels join with those of changed ones."""

    def group(name: str) -> str | None:
        matches = (pattern.fullmatch(name) for pattern in _SHARED_INPUT)
        return next((f"{match[1]}*{match[2]}" for match in matches if match), None)

    groups = {group(name) for name in changed} - {None}
    return {name for name in known if group(name) in groups}
