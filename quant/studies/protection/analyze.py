"""Analyze which blocks and linears suffer from quantization, and propose blocks to protect.

Three measurements on recorded points: activations of the model as it serves, the error energy of
each block and linear quantized alone, and how well those energies add. The proposal is the greedy
set, which is optimal as far as they add.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quant.recipe.evidence import measured_recipe
from quant.recipe.recipe import QuantRecipe
from quant.recipe.selection import select_linears
from quant.studies.block_stream import BlockStream
from quant.studies.output.study_folder import Json, StudyFolder
from quant.studies.points import Point, PointsFolder
from quant.studies.progress import StudyProgress
from quant.studies.protection.activations import Activation, measure_points
from quant.studies.protection.block_sets import middle_set, paper_sets
from quant.studies.protection.sensitivity import (
    Sweep,
    Variant,
    set_energies,
    sweep_cost,
    sweeps,
)
from quant.studies.protection.variants import BlockQuantizer, act_scales


@dataclass(frozen=True, slots=True)
class AnalysisOptions:
    """How much is measured.

    Attributes:
        points_per_prompt: points of each prompt at which blocks are quantized one at a time.
        linear_points: points, of different prompts, at which linears are, and whole sets.
        batch: how many samples run together.
    """

    points_per_prompt: int = 2
    linear_points: int = 32
    batch: int = 8


@dataclass(frozen=True, slots=True)
class Subject:
    """What is analyzed.

    Attributes:
        recipe: with its blocks all quantized, but for the linears that it keeps in BF16.
        linears: names inside each block of the linears that the recipe quantizes, by block.
        service, exact: passes in the model's dtype and in float32; on a CPU both are in float32.
        host: where the streams of many points are kept.
        keep: whether all blocks are kept on the device.
    """

    recipe: QuantRecipe
    linears: Mapping[int, tuple[str, ...]]
    service: BlockStream
    exact: BlockStream
    host: torch.device
    keep: bool

    @classmethod
    def of(
        cls, transformer: Any, recipe: QuantRecipe, device: torch.device, *, keep: bool
    ) -> Subject:
        """Prepare a transformer on the host.

        Args:
            keep: keep all blocks on the device, and the streams of many points, which is faster
                where they fit (`study_device`).

        Raises:
            ConversionError: the recipe's patterns do not fit the transformer's blocks.
        """
        everywhere = measured_recipe(recipe, len(transformer.blocks))
        # A block of which the recipe keeps every linear has none.
        found: dict[int, list[str]] = {block: [] for block in range(len(transformer.blocks))}
        for name in select_linears(transformer, everywhere):
            _, block, inner = name.split(".", 2)
            found[int(block)].append(inner)
        exact = BlockStream(transformer, device, torch.float32, keep=keep)
        # Many CPUs take ten times as long for products in BF16, and activations hardly differ.
        on_cpu = device.type == "cpu"
        return cls(
            everywhere,
            {block: tuple(names) for block, names in found.items()},
            exact if on_cpu else BlockStream(transformer, device, None, keep=keep),
            exact,
            device if keep else torch.device("cpu"),
            keep,
        )

    @property
    def recipe_words(self) -> str:
        """Name the recipe for a page, with the linears that it keeps in BF16."""
        kept = ", ".join(self.recipe.kept_linears)
        return f"{self.recipe.name}, which keeps {kept} in BF16" if kept else self.recipe.name

    def full_names(self, block: int) -> tuple[str, ...]:
        """Return the full names of a block's linears."""
        return tuple(f"blocks.{block}.{name}" for name in self.linears[block])

    def single_blocks(self) -> list[Variant]:
        """Return the variants with one block quantized."""
        return [Variant(str(block), block, self.full_names(block)) for block in self.linears]

    def single_linears(self) -> list[Variant]:
        """Return the variants with one linear quantized."""
        return [
            Variant(name, block, (name,))
            for block in self.linears
            for name in self.full_names(block)
        ]


def chosen_points(points: PointsFolder, per_prompt: int) -> list[tuple[int, int]]:
    """Choose points of every prompt, spread over steps and branches: (prompt, number) each."""
    each = points.info.points // len(points.info.prompts)
    count = min(per_prompt, each)
    # Another start for each prompt, so that all points of a trajectory are used.
    return [
        (prompt, (part * each // count + prompt) % each)
        for prompt in range(len(points.info.prompts))
        for part in range(count)
    ]


def analysis_cost(subject: Subject, points: PointsFolder, options: AnalysisOptions) -> int:
    """Return how many passes of one block the analysis takes."""
    blocks = subject.exact.blocks
    chosen = chosen_points(points, options.points_per_prompt)
    checked = _linear_points(options, chosen)
    latents = next(points.of_prompt(0)).latents
    each = len(chosen) // len(points.info.prompts)
    single = len(points.info.prompts) * _cost(subject, subject.single_blocks(), latents, each)
    single += len(checked) * _cost(subject, subject.single_linears(), latents, 1)
    sets = (len(_checked_sets(blocks)) + 1) * blocks * len(checked)
    return points.info.points * blocks + single + sets


def _cost(subject: Subject, variants: Sequence[Variant], latents: Tensor, points: int) -> int:
    """Return how many passes of one block the sweeps of one prompt take."""
    size = points * subject.exact.stream_bytes(latents)
    blocks = subject.exact.blocks
    return sum(sweep_cost(blocks, part, points) for part in sweeps(variants, size))


def measure_activations(
    subject: Subject,
    points: PointsFolder,
    batch: int,
    folder: StudyFolder,
    progress: StudyProgress,
) -> None:
    """Keep a unit of statistics for each prompt, of whose points `batch` run together."""
    for prompt, text in enumerate(points.info.prompts):
        unit = f"activations/{prompt}"
        if folder.unit(unit) is None:
            progress.describe(f"activations, prompt {prompt + 1} of {len(points.info.prompts)}")
            picked = list(points.of_prompt(prompt))
            parts = [picked[start : start + batch] for start in range(0, len(picked), batch)]
            folder.keep(unit, _measured(subject, parts, text, progress))
        else:
            progress.skip(points.info.points // len(points.info.prompts) * subject.service.blocks)


def quantizer_of(subject: Subject, folder: StudyFolder, prompts: int) -> BlockQuantizer:
    """Build the quantizer with the scales that the measured activations give."""
    amax: dict[str, float] = {}
    binades: dict[str, Tensor] = {}
    for prompt in range(prompts):
        unit = folder.unit(f"activations/{prompt}")
        assert unit is not None, "activations are measured first"
        for name, counts in unit["binades"].items():
            binades[name] = binades.get(name, torch.zeros(len(counts))) + torch.tensor(counts)
        for point in unit["points"]:
            for name, values in point["linears"].items():
                amax[name] = max(amax.get(name, 0.0), values[0])
    lists = {name: counts.tolist() for name, counts in binades.items()}
    return BlockQuantizer(
        subject.recipe, act_scales(subject.recipe, amax, lists), {} if subject.keep else None
    )


def measure_sensitivity(
    subject: Subject,
    points: PointsFolder,
    quantizer: BlockQuantizer,
    options: AnalysisOptions,
    folder: StudyFolder,
    progress: StudyProgress,
) -> None:
    """Keep the error energies of single blocks and linears, a unit for each sweep of a prompt."""
    chosen = chosen_points(points, options.points_per_prompt)
    linear_prompts = {prompt for prompt, _ in _linear_points(options, chosen)}
    sweep = Sweep(subject.exact, quantizer, options.batch, progress.advance)
    for prompt in range(len(points.info.prompts)):
        progress.describe(f"single blocks, prompt {prompt + 1} of {len(points.info.prompts)}")
        every = list(points.of_prompt(prompt))
        picked = [every[number] for of, number in chosen if of == prompt]
        work = [(picked, subject.single_blocks())]
        if prompt in linear_prompts:
            work.append((picked[:1], subject.single_linears()))
        for some, variants in work:
            size = len(some) * subject.exact.stream_bytes(some[0].latents)
            for part in sweeps(variants, size):
                unit = sensitivity_unit(prompt, part[0].key)
                if folder.unit(unit) is not None:
                    progress.skip(sweep_cost(subject.exact.blocks, part, len(some)))
                    continue
                energy = sweep.energies(some, part)
                folder.keep(unit, {"points": [each.name for each in some], "energy": energy})


def sensitivity_unit(prompt: int, first: str) -> str:
    """Return the name of the unit of a sweep whose first variant is `first`."""
    return f"sensitivity/{prompt}/{first}"


def measure_additivity(
    subject: Subject,
    points: PointsFolder,
    quantizer: BlockQuantizer,
    options: AnalysisOptions,
    folder: StudyFolder,
    progress: StudyProgress,
) -> None:
    """Keep the error energies of whole sets at the points of the linears: do single ones add?"""
    blocks = subject.exact.blocks
    checked = _checked_sets(blocks)
    chosen = _linear_points(options, chosen_points(points, options.points_per_prompt))
    for start in range(0, len(chosen), options.batch):
        part = chosen[start : start + options.batch]
        cost = blocks * len(part)
        if all(folder.unit(f"sets/{prompt}") is not None for prompt, _ in part):
            progress.skip(cost * (len(checked) + 1))
            continue
        progress.describe(f"sets of blocks, {start + len(part)} of {len(chosen)} points")
        picked = [list(points.of_prompt(prompt))[number] for prompt, number in part]
        reference = subject.exact.velocity(picked)
        progress.advance(cost)
        measured: dict[str, list[float]] = {}
        for name, protected in checked.items():
            names = {
                block: subject.full_names(block)
                for block in range(blocks)
                if block not in protected
            }
            measured[name] = set_energies(subject.exact, picked, reference, quantizer, names)
            progress.advance(cost)
        for place, (prompt, _) in enumerate(part):
            value: Json = {"point": picked[place].name, "protected": checked}
            value["measured"] = {name: found[place] for name, found in measured.items()}
            if folder.unit(f"sets/{prompt}") is None:
                folder.keep(f"sets/{prompt}", value)


def _measured(
    subject: Subject, parts: Sequence[Sequence[Point]], text: str, progress: StudyProgress
) -> Json:
    totals: dict[str, Tensor] = {}
    found = []
    for part in parts:
        measured = measure_points(subject.service, part, subject.linears)
        for name, counts in measured.binades.items():
            totals[name] = totals.get(name, torch.zeros_like(counts)) + counts
        found += [
            {
                "step": point.step,
                "branch": point.branch,
                "linears": {name: each[n].tolist() for name, each in measured.linears.items()},
                "stream": [each[n].tolist() for each in measured.stream],
                "update": [float(each[n]) for each in measured.update],
            }
            for n, point in enumerate(part)
        ]
        progress.advance(subject.service.blocks * len(part))
    return {
        "prompt": text,
        "values": list(Activation.names()),
        "points": found,
        "binades": {name: counts.int().tolist() for name, counts in totals.items()},
    }


def _checked_sets(blocks: int) -> dict[str, tuple[int, ...]]:
    """Return the sets of protected blocks whose energy is predicted and measured."""
    paper = paper_sets(blocks)
    count = len(paper["both ends"])
    half = tuple(range(0, blocks, 2))
    return paper | {"middle": middle_set(blocks, count), "every second": half}


def _linear_points(
    options: AnalysisOptions, chosen: Sequence[tuple[int, int]]
) -> list[tuple[int, int]]:
    """Return the first chosen point of as many prompts as linears are measured at, spread."""
    firsts = list({prompt: (prompt, number) for prompt, number in reversed(chosen)}.values())[::-1]
    count = max(1, min(options.linear_points, len(firsts)))
    return [firsts[part * len(firsts) // count] for part in range(count)]
