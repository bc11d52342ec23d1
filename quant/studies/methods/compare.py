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
from quant.studies.points import Point
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
    batches = [_Batch.of(held_out, prompts) for prompts in held_out.batches]
    references: list[Tensor | None] = []
    for batch in batches:
        cost = exact.blocks * len(batch.points)
        if not any(batch.missing(folder, method) for method in methods):
            references.append(None)
            progress.skip(cost)
            continue
        progress.describe(f"float32, up to prompt {batch.prompts[-1] + 1}")
        references.append(exact.velocity(batch.points).cpu())
        progress.advance(cost)
    for method in methods:
        quantizer = MethodQuantizer(method, model)
        for batch, reference in zip(batches, references, strict=True):
            cost = exact.blocks * len(batch.points)
            missing = batch.missing(folder, method)
            if reference is None or not missing:
                progress.skip(cost * len(protections))
                continue
            progress.describe(f"{method.name}, up to prompt {batch.prompts[-1] + 1}")
            steps = tuple(point.step for point in batch.points)
            found = {}
            for name, protected in protections.items():
                velocity = exact.velocity(batch.points, quantizer.change(protected, steps))
                found[name] = iter(energies(velocity.cpu(), reference))
                progress.advance(cost)
            for prompt, count in zip(batch.prompts, batch.counts, strict=True):
                value = {name: [next(each) for _ in range(count)] for name, each in found.items()}
                if prompt in missing:
                    folder.keep(_unit(method, prompt), value)


@dataclass(frozen=True, slots=True)
class _Batch:
    """Points of some prompts that run together; it runs again as a whole if one lacks a unit.

    Attributes:
        counts: how many points each prompt has.
    """

    prompts: range
    points: list[Point]
    counts: list[int]

    @classmethod
    def of(cls, held_out: HeldOut, prompts: range) -> _Batch:
        """Read the points of some prompts."""
        found = [held_out.of_prompt(prompt) for prompt in prompts]
        return cls(prompts, [point for each in found for point in each], [*map(len, found)])

    def missing(self, folder: StudyFolder, method: Method) -> list[int]:
        """Return the prompts whose errors with a method no earlier run has kept."""
        return [prompt for prompt in self.prompts if folder.unit(_unit(method, prompt)) is None]


def measured(
    folder: StudyFolder, method: Method, prompts: int, protection: str
) -> list[list[float]]:
    """Return the error energies of a method, of each point of each prompt."""
    return [folder.unit(_unit(method, prompt))[protection] for prompt in range(prompts)]  # type: ignore[index]


def _unit(method: Method, prompt: int) -> str:
    return f"{method.name}/{prompt}"
