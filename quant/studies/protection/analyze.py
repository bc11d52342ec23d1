"""Analyze which blocks and linears suffer from quantization, and propose blocks to protect.

Three measurements on recorded points: activations of the model as it serves, the error energy of
each block and linear quantized alone, and how well those energies add. The proposal is the greedy
set, which is optimal as far as they add.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from quant.recipe.recipe import QuantRecipe
from quant.recipe.selection import select_linears
from quant.studies.block_stream import BlockStream
from quant.studies.output.study_folder import Json, StudyFolder
from quant.studies.points import Point, PointsFolder
from quant.studies.progress import StudyProgress
from quant.studies.protection.activations import Activation, measure_point
from quant.studies.protection.block_sets import middle_set, paper_sets
from quant.studies.protection.sensitivity import reference_pass, set_energies, variant_energies
from quant.studies.protection.variants import BlockQuantizer, act_scales


@dataclass(frozen=True, slots=True)
class AnalysisOptions:
    """How much is measured.

    Attributes:
        points_per_prompt: points of each prompt at which blocks are quantized one at a time.
        linear_points: points, of different prompts, at which linears are.
        batch: how many samples run together.
    """

    points_per_prompt: int = 2
    linear_points: int = 32
    batch: int = 8


@dataclass(frozen=True, slots=True)
class Subject:
    """What is analyzed.

    Attributes:
        recipe: with its blocks all quantized.
        linears: names inside each block of the linears that the recipe quantizes, by block.
        service, exact: passes in the model's dtype and in float32; on a CPU both are in float32.
        host: where streams of a pass are kept.
    """

    recipe: QuantRecipe
    linears: Mapping[int, tuple[str, ...]]
    service: BlockStream
    exact: BlockStream
    host: torch.device

    @classmethod
    def of(
        cls, transformer: Any, recipe: QuantRecipe, device: torch.device, *, keep: bool
    ) -> Subject:
        """Prepare a transformer on the host.

        Args:
            keep: keep all blocks and streams on the device, which is faster where they fit.

        Raises:
            ConversionError: the recipe's patterns do not fit the transformer's blocks.
        """
        everywhere = replace(
            recipe, total_blocks=len(transformer.blocks), protected_blocks=(), kept_linears=()
        )
        found: dict[int, list[str]] = {}
        for name in select_linears(transformer, everywhere):
            _, block, inner = name.split(".", 2)
            found.setdefault(int(block), []).append(inner)
        exact = BlockStream(transformer, device, torch.float32, keep=keep)
        # Many CPUs take ten times as long for products in BF16, and activations hardly differ.
        on_cpu = device.type == "cpu"
        return cls(
            everywhere,
            {block: tuple(names) for block, names in found.items()},
            exact if on_cpu else BlockStream(transformer, device, None, keep=keep),
            exact,
            device if keep else torch.device("cpu"),
        )

    def full_names(self, block: int) -> tuple[str, ...]:
        """Return the full names of a block's linears."""
        return tuple(f"blocks.{block}.{name}" for name in self.linears[block])


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
    linear_prompts = {prompt for prompt, _ in checked}
    prompts = range(len(points.info.prompts))
    per_prompt = [sum(of == prompt for of, _ in chosen) for prompt in prompts]
    single = sum(
        _single_cost(subject, per_prompt[prompt], prompt in linear_prompts) for prompt in prompts
    )
    sets = (len(_checked_sets(blocks)) + 1) * blocks * len(checked)
    return points.info.points * blocks + single + sets


def measure_activations(
    subject: Subject, points: PointsFolder, folder: StudyFolder, progress: StudyProgress
) -> None:
    """Keep a unit of statistics for each prompt."""
    for prompt, text in enumerate(points.info.prompts):
        unit = f"activations/{prompt}"
        if folder.unit(unit) is None:
            progress.describe(f"activations, prompt {prompt + 1} of {len(points.info.prompts)}")
            folder.keep(unit, _measured(subject, points.of_prompt(prompt), text, progress))
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
    return BlockQuantizer(subject.recipe, act_scales(subject.recipe, amax, lists))


def measure_sensitivity(
    subject: Subject,
    points: PointsFolder,
    quantizer: BlockQuantizer,
    options: AnalysisOptions,
    folder: StudyFolder,
    progress: StudyProgress,
) -> None:
    """Keep the error energies of single blocks and linears, a unit for each prompt."""
    chosen = chosen_points(points, options.points_per_prompt)
    linear_prompts = {prompt for prompt, _ in _linear_points(options, chosen)}
    for prompt in range(len(points.info.prompts)):
        unit = f"sensitivity/{prompt}"
        numbers = [number for of, number in chosen if of == prompt]
        if folder.unit(unit) is not None:
            progress.skip(_single_cost(subject, len(numbers), prompt in linear_prompts))
            continue
        progress.describe(f"single blocks, prompt {prompt + 1} of {len(points.info.prompts)}")
        every = list(points.of_prompt(prompt))
        picked = [every[number] for number in numbers]
        value: Json = {"points": [each.name for each in picked]}
        value["blocks"] = _single(subject, picked, quantizer, options.batch, progress)
        if prompt in linear_prompts:
            value["linears"] = _single(
                subject, picked[:1], quantizer, options.batch, progress, linears=True
            )
        folder.keep(unit, value)


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
    chosen = chosen_points(points, options.points_per_prompt)
    for prompt, number in _linear_points(options, chosen):
        unit = f"sets/{prompt}"
        if folder.unit(unit) is not None:
            progress.skip(blocks * (len(_checked_sets(blocks)) + 1))
            continue
        progress.describe(f"sets of blocks, prompt {prompt + 1}")
        point = list(points.of_prompt(prompt))[number]
        reference = subject.exact.velocity([point])
        progress.advance(blocks)
        checked = _checked_sets(blocks)
        value: Json = {"point": point.name, "protected": checked, "measured": {}}
        for name, protected in checked.items():
            names = {
                block: subject.full_names(block)
                for block in range(blocks)
                if block not in protected
            }
            found = set_energies(subject.exact, [point], reference, quantizer, names)
            value["measured"][name] = found[0]
            progress.advance(blocks)
        folder.keep(unit, value)


def _measured(
    subject: Subject, points: Iterator[Point], text: str, progress: StudyProgress
) -> Json:
    totals: dict[str, Tensor] = {}
    found = []
    for point in points:
        measured = measure_point(subject.service, point, subject.linears)
        for name, counts in measured.binades.items():
            totals[name] = totals.get(name, torch.zeros_like(counts)) + counts
        found.append(
            {
                "step": point.step,
                "branch": point.branch,
                "linears": {name: each.as_list() for name, each in measured.linears.items()},
                "stream": [each.as_list() for each in measured.stream],
                "update": measured.update,
            }
        )
        progress.advance(subject.service.blocks)
    return {
        "prompt": text,
        "values": list(Activation.names()),
        "points": found,
        "binades": {name: counts.int().tolist() for name, counts in totals.items()},
    }


def _single(
    subject: Subject,
    points: Sequence[Point],
    quantizer: BlockQuantizer,
    batch: int,
    progress: StudyProgress,
    *,
    linears: bool = False,
) -> dict[str, list[float]]:
    """Return the error energies at points of each block, or of each linear, by its name."""
    found: dict[str, list[float]] = {}
    blocks = subject.exact.blocks
    reference = reference_pass(subject.exact, points, subject.host)
    if not linears:
        progress.advance(blocks * len(points))
    for block in range(blocks):
        names = subject.full_names(block)
        variants = [(name,) for name in names] if linears else [names]
        keys = names if linears else (str(block),)
        energies = variant_energies(subject.exact, reference, quantizer, block, variants, batch)
        for key, each in zip(keys, energies, strict=True):
            found[key] = each
        progress.advance((blocks - block) * len(variants) * len(points))
    return found


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


def _single_cost(subject: Subject, points: int, with_linears: bool) -> int:
    """Return the passes of one block that `_single` takes for one prompt."""
    blocks = subject.exact.blocks
    cost = points * (blocks + blocks * (blocks + 1) // 2)
    if with_linears:
        cost += sum(len(names) * (blocks - block) for block, names in subject.linears.items())
    return cost
