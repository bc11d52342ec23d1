"""Hold the transformer that is trained: master weights in float32, linears with a rounding.

All runs of a study share one student. A run begins with `reset`, and what is measured is what a
file would hold: `as_stored` rounds the weights to the dtypes of the model's own.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quant.errors import StudyError
from quant.studies.methods.calibration import Calibration
from quant.studies.methods.method import Method
from quant.studies.protection.analyze import Subject
from quant.studies.qat.straight_through import StaticScale, TrainedLinear

_LAYERS = ("lora_A", "lora_B")


@dataclass(slots=True)
class Student:
    """A transformer in float32 on the device.

    Attributes:
        linears: what is rounded, by full name; not those of protected blocks.
        trained: the master weights that training changes, by name.
        autocast: the dtype of products in training; None for float32.
        rank: of the adapters; None if all weights are trained.
    """

    model: Any
    original: Any
    device: torch.device
    linears: Mapping[str, TrainedLinear]
    trained: Mapping[str, nn.Parameter]
    autocast: torch.dtype | None
    rank: int | None
    _start: Mapping[str, Tensor]

    @classmethod
    def of(
        cls,
        subject: Subject,
        protected: Sequence[int],
        *,
        rank: int | None,
        autocast: torch.dtype | None,
        seed: int,
    ) -> Student:
        """Copy the subject's transformer to its device, and prepare its linears.

        Args:
            protected: blocks whose linears are not rounded; they are trained all the same, unless
                adapters are.
            rank: of LoRA adapters on the rounded linears; None trains all weights.
            seed: of the adapters' first weights.
        """
        original, device = subject.exact.transformer, subject.exact.device
        model = nn.Module.to(copy.deepcopy(original), device, torch.float32)  # all, norms too
        names = [
            name
            for index in subject.linears
            if index not in protected
            for name in subject.full_names(index)
        ]
        model.requires_grad_(rank is None)
        if rank is not None:
            _add_adapters(model, names, rank, seed)
        linears = {name: _prepare(model, name) for name in names}
        trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
        if rank is None:
            start = dict(original.named_parameters())
        else:
            start = {name: each.detach().clone() for name, each in trained.items()}
        model.eval()  # it has no dropout to train with
        return cls(model, original, device, linears, trained, autocast, rank, start)

    @torch.no_grad()
    def reset(self) -> None:
        """Give the weights that are trained their first values."""
        for name, each in self.trained.items():
            each.copy_(self._start[name])

    def quantize_as(self, method: Method | None, scales: Mapping[str, StaticScale | None]) -> None:
        """Round the linears by a method; None rounds nothing.

        Args:
            scales: static scales of inputs, from `input_scales`.
        """
        for name, linear in self.linears.items():
            linear.quantize_as(method, scales.get(name))

    def input_scales(
        self, method: Method, calibration: Calibration
    ) -> dict[str, StaticScale | None]:
        """Return the static scales of a method by linear, from what calibration has seen."""
        found: dict[str, StaticScale | None] = {}
        blocks = {int(name.split(".")[1]) for name in self.linears}
        for block in sorted(blocks):
            for name, seen in calibration.statistics(block, self.device).items():
                full_name = f"blocks.{block}.{name}"
                if full_name in self.linears:
                    found[full_name] = StaticScale.calibrated(method, seen)
        return found

    def velocity(self, latents: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        """Run the transformer.

        Args:
            latents: [B, C, F, H, W] float32.
            timestep: [B] float32.
            text: [B, T, D] float32.

        Returns:
            [B, C, F, H, W] float32.
        """
        found: Tensor = self.model(latents, timestep, text, return_dict=False)[0]
        return found.float()

    @contextmanager
    def mixed(self) -> Iterator[None]:
        """Compute a training step's products in the dtype that was asked for, in the context."""
        if self.autocast is None:
            yield
            return
        with warnings.catch_warnings():
            # Norms keep float32 weights for BF16 inputs, which is meant; it costs a fused kernel.
            warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
            # Weights change with each step, so no cast of them may be kept for the next.
            with torch.autocast(self.device.type, self.autocast, cache_enabled=False):
                yield

    @contextmanager
    def as_stored(self) -> Iterator[None]:
        """Round the trained weights as a file would hold them, within the context."""
        kept = {name: each.detach().clone() for name, each in self.trained.items()}
        self._round_to_stored()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, each in self.trained.items():
                    each.copy_(kept[name])
            for linear in self.linears.values():
                linear.as_stored = None

    @torch.no_grad()
    def _round_to_stored(self) -> None:
        for name, each in self.trained.items():
            each.copy_(each.to(self._start[name].dtype))
        stored = dict(self.original.named_parameters())
        for name, linear in self.linears.items():
            if linear.adapter is not None:
                linear.as_stored = stored[f"{name}.weight"].dtype

    @torch.no_grad()
    def exported(self) -> Any:
        """Return the original transformer's class with the trained weights, on the host."""
        made = copy.deepcopy(self.original)
        targets = dict(made.named_parameters())
        for name, each in self.trained.items():
            if name in targets:
                targets[name].copy_(each)
        for name, linear in self.linears.items():
            if linear.adapter is not None:
                targets[f"{name}.weight"].copy_(linear.merged_weight())
        return made

    def adapters(self) -> dict[str, Tensor]:
        """Return the adapters as diffusers' `load_lora_weights` reads them; none without LoRA."""
        found = {}
        for name, linear in self.linears.items():
            for layer in _LAYERS if linear.adapter is not None else ():
                weight = getattr(linear.adapter, layer)["default"].weight.detach()
                found[f"transformer.{name}.{layer}.weight"] = weight.cpu().clone()
        return found


def check_adapters() -> None:
    """Refuse adapters where the package that makes them is missing.

    Raises:
        StudyError: names the remedy.
    """
    try:
        import peft  # noqa: F401, PLC0415 (an extra)
    except ImportError as error:
        raise StudyError(
            f"adapters need the package peft ({error}): install it with "
            "`pip install 'wan-hif8[studies]'`, or train all weights with --adapter none"
        ) from error


def trained_weights(subject: Subject, protected: Sequence[int], rank: int | None) -> int:
    """Return how many weights a student would train."""
    transformer = subject.exact.transformer
    if rank is None:
        return sum(each.numel() for each in transformer.parameters())
    shapes = [
        transformer.blocks[index].get_submodule(name).weight.shape
        for index, names in subject.linears.items()
        if index not in protected
        for name in names
    ]
    return sum(rank * (rows + width) for rows, width in shapes)


def _prepare(model: nn.Module, name: str) -> TrainedLinear:
    """Replace a linear, or a LoRA layer around one, by one whose rounding can be changed."""
    parent_name, _, own_name = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    module: Any = getattr(parent, own_name)
    adapter = module if hasattr(module, "base_layer") else None
    linear = TrainedLinear(module if adapter is None else module.base_layer, adapter)
    setattr(parent, own_name, linear)
    return linear


def _add_adapters(model: nn.Module, names: Sequence[str], rank: int, seed: int) -> None:
    """Put LoRA layers around linears: delta = B @ A, B zero at first; alpha equals the rank."""
    from peft import LoraConfig, inject_adapter_in_model  # noqa: PLC0415 (an extra)

    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(names))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model)
