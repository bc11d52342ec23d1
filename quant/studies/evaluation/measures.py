"""Collect what judges and the velocity error say about every candidate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from quant.errors import StudyError
from quant.recipe.selection import select_linears
from quant.studies.block_stream import SMALL_BYTES, BlockStream
from quant.studies.evaluation.candidates import BF16, Candidate
from quant.studies.evaluation.generate import Plan
from quant.studies.evaluation.judges.interface import Judge, Needs
from quant.studies.output.study_folder import StudyFolder
from quant.studies.points import PointsFolder
from quant.studies.progress import StudyProgress
from quant.studies.protection.sensitivity import energies, set_energies
from quant.studies.protection.variants import BlockQuantizer

VELOCITY = "velocity-error"


@dataclass(frozen=True, slots=True)
class Measure:
    """The numbers of one judge.

    Attributes:
        needs: see `Judge`; "video" has numbers of BF16, too.
        prompts: the prompt of each number.
        values: by candidate, each as long as `prompts` and in that order.
    """

    name: str
    unit: str
    higher_is_better: bool
    needs: Needs
    prompts: Sequence[str]
    values: Mapping[str, Sequence[float]]


def judge_videos(
    plan: Plan,
    names: Sequence[str],
    judges: Sequence[Judge],
    folder: StudyFolder,
    progress: StudyProgress,
) -> list[Measure]:
    """Let every judge see every video that it has not seen in an earlier run.

    Args:
        names: of the candidates, without BF16.

    Raises:
        StudyError: a judge fails or gives a number that is not finite.
    """
    references = plan.of_candidate(folder.path, BF16)
    found = []
    for judge in judges:
        values: dict[str, list[float]] = {}
        for name in names if judge.needs == "pair" else (BF16, *names):
            videos = plan.of_candidate(folder.path, name)
            units = [f"score/{judge.name}/{name}/{each.stem.name}" for each in videos]
            left = [place for place, unit in enumerate(units) if folder.unit(unit) is None]
            progress.skip(len(videos) - len(left))
            progress.describe(f"{judge.name} of {name}")
            scores = judge.scores([videos[n] for n in left], [references[n] for n in left])
            try:
                for place, score in zip(left, scores, strict=True):
                    folder.keep(units[place], float(score))
                    progress.advance()
            except ValueError as error:  # of a judge of another package, too
                raise StudyError(
                    f"the judge {judge.name} failed: {error}; leave it out, and the same command "
                    "goes on with the videos that are there"
                ) from error
            values[name] = [float(folder.unit(unit)) for unit in units]  # type: ignore[arg-type]
        prompts = [each.prompt for each in references]
        found.append(
            Measure(judge.name, judge.unit, judge.higher_is_better, judge.needs, prompts, values)
        )
    return found


def measure_velocity(
    transformer: Any,
    candidates: Sequence[Candidate],
    points: PointsFolder,
    folder: StudyFolder,
    progress: StudyProgress,
) -> Measure:
    """Measure the error energy of the velocity against float32, in percent, at recorded points.

    What the blocks' linears lose is in it; what 8-bit attention loses is not.

    Args:
        transformer: in BF16 on its device.
    """
    device = next(transformer.parameters()).device
    keep = sum(each.nbytes for each in transformer.parameters()) < SMALL_BYTES
    exact = BlockStream(transformer, device, torch.float32, keep=keep)
    service = BlockStream(transformer, device, None, keep=keep)
    prompts: list[str] = []
    values: dict[str, list[float]] = {name: [] for name in (BF16, *(c.name for c in candidates))}
    quantizers = {
        each.name: (
            BlockQuantizer(each.recipe, each.scales.act_scale, {} if keep else None),
            _linears(transformer, each),
        )
        for each in candidates
    }
    for number, text in enumerate(points.info.prompts):
        unit = f"velocity/{number}"
        if folder.unit(unit) is None:
            progress.describe(f"velocity, prompt {number + 1} of {len(points.info.prompts)}")
            picked = list(points.of_prompt(number))
            reference = exact.velocity(picked)
            kept = {BF16: energies(service.velocity(picked).float(), reference)}
            for name, (quantizer, linears) in quantizers.items():
                kept[name] = set_energies(exact, picked, reference, quantizer, linears)
            folder.keep(unit, kept)
            progress.advance(velocity_passes(points, candidates))
        else:
            progress.skip(velocity_passes(points, candidates))
        found = folder.unit(unit)
        assert found is not None, "it has just been kept"
        prompts += [text] * len(found[BF16])
        for name, each in values.items():
            each += [100 * energy for energy in found[name]]
    return Measure(VELOCITY, "%", False, "video", prompts, values)


def velocity_passes(points: PointsFolder, candidates: Sequence[Candidate]) -> int:
    """Return how many passes of a transformer the points of one prompt take."""
    return points.info.points // len(points.info.prompts) * (2 + len(candidates))


def _linears(transformer: Any, candidate: Candidate) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for name in select_linears(transformer, candidate.recipe):
        found.setdefault(int(name.split(".")[1]), []).append(name)
    return found
