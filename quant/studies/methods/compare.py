"""Measure the velocity's error with each method, under several protections, on held-out points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from quant.studies.block_stream import Change
from quant.studies.methods.attention import RoundedAttention
from quant.studies.methods.calibration import Calibration
from quant.studies.methods.method import Method, PreparedLinear
from quant.studies.output.study_folder import StudyFolder
from quant.studies.progress import StudyProgress
from quant.studies.protection.ablate import HeldOut
from quant.studies.protection.analyze import Subject
from quant.studies.protection.sensitivity import energies
from quant.transformer.module_tree import share_tree

Protections = Mapping[str, tuple[int, ...]]
"""The blocks that stay exact, by the protection's name."""


@dataclass(frozen=True, slots=True)
class Calibrated:
    """A subject and what calibration has seen of it.

    Attributes:
        keep: keep a method's rounded weights, where the model fits in memory several times.
    """

    subject: Subject
    calibration: Calibration
    keep: bool


@dataclass(slots=True)
class MethodQuantizer:
    """Quantizes blocks by a method."""

    method: Method
    model: Calibrated
    _prepared: dict[int, dict[str, PreparedLinear]] = field(default_factory=dict)

    def change(self, protected: tuple[int, ...], steps: tuple[int, ...]) -> Change:
        """Return the change of a pass over a batch of points.

        Args:
            protected: blocks that stay exact.
            steps: the denoising step of each point.
        """

        def change(index: int, block: nn.Module) -> nn.Module:
            if index in protected:
                return block
            linears = self._linears(index, block)
            ready = {
                name: each.at(steps, self.model.calibration.steps) for name, each in linears.items()
            }
            changed = share_tree(block, lambda name, _: ready.get(name))
            if self.method.attention is not None:
                attention = changed.get_submodule("attn1")
                attention.processor = RoundedAttention(self.method.attention)  # type: ignore[assignment]
            return changed

        return change

    def _linears(self, index: int, block: nn.Module) -> dict[str, PreparedLinear]:
        if index in self._prepared:
            return self._prepared[index]
        device = self.model.subject.exact.device
        statistics = self.model.calibration.statistics(index, device)
        codes = self.model.calibration.codes(index, self.method, device)
        found = {}
        for name in self.model.subject.linears[index]:
            linear = block.get_submodule(name)
            assert isinstance(linear, nn.Linear), "only linears are selected"
            found[name] = PreparedLinear.of(self.method, linear, statistics[name], codes.get(name))
        if self.model.keep:
            self._prepared[index] = found
        return found


def comparison_cost(blocks: int, points: int, methods: int, protections: int) -> int:
    """Return how many passes of one block `measure_methods` takes."""
    return blocks * points * (1 + methods * protections)


@torch.no_grad()
def measure_methods(
    model: Calibrated,
    held_out: HeldOut,
    methods: Sequence[Method],
    protections: Protections,
    folder: StudyFolder,
    progress: StudyProgress,
) -> None:
    """Keep the error energies of every method, a unit for each method and prompt."""
    exact = model.subject.exact
    prompts = range(len(held_out.points.info.prompts))
    points = {prompt: held_out.of_prompt(prompt) for prompt in prompts}
    references: dict[int, Tensor] = {}
    for prompt in prompts:
        cost = exact.blocks * len(points[prompt])
        if all(folder.unit(_unit(method, prompt)) is not None for method in methods):
            progress.skip(cost)
            continue
        progress.describe(f"float32, prompt {prompt + 1} of {len(prompts)}")
        references[prompt] = exact.velocity(points[prompt]).cpu()
        progress.advance(cost)
    for method in methods:
        quantizer = MethodQuantizer(method, model)
        for prompt in prompts:
            cost = exact.blocks * len(points[prompt])
            if folder.unit(_unit(method, prompt)) is not None:
                progress.skip(cost * len(protections))
                continue
            progress.describe(f"{method.name}, prompt {prompt + 1} of {len(prompts)}")
            steps = tuple(point.step for point in points[prompt])
            value = {}
            for name, protected in protections.items():
                velocity = exact.velocity(points[prompt], quantizer.change(protected, steps))
                value[name] = energies(velocity.cpu(), references[prompt])
                progress.advance(cost)
            folder.keep(_unit(method, prompt), value)


def measured(
    folder: StudyFolder, method: Method, prompts: int, protection: str
) -> list[list[float]]:
    """Return the error energies of a method, of each point of each prompt."""
    return [folder.unit(_unit(method, prompt))[protection] for prompt in range(prompts)]  # type: ignore[index]


def _unit(method: Method, prompt: int) -> str:
    return f"{method.name}/{prompt}"
