"""Refuse evaluation prompts that a calibration or an analysis has seen."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from quant.calibration.prompts import PromptSet
from quant.errors import CalibrationError, StudyError
from quant.studies.evaluation.candidates import Candidate
from quant.studies.output.study_folder import StudyFolder


def check_unseen(
    prompts: PromptSet,
    candidates: Sequence[Candidate],
    model: Path,
    calibration: Sequence[Path],
    analyses: Sequence[Path],
) -> None:
    """Check that no prompt has chosen a scale or a block.

    A scales file knows its prompts by their hash alone, so the file of prompts is looked for: among
    `calibration`, under its name in the scales file, and beside the model and the scales.

    Raises:
        StudyError: a prompt was seen; or a candidate's prompts are not to be found.
    """
    given = [PromptSet.read(path) for path in calibration]
    for candidate in candidates:
        scales = candidate.scales
        if not scales.num_prompts:
            continue
        if scales.prompts_sha256 == prompts.sha256:
            raise StudyError(
                f"{prompts.file} holds the very prompts that {candidate.name} was calibrated on: "
                "evaluate on others"
            )
        known = [*given, *_found(candidate, model)]
        fitting = next((each for each in known if each.sha256 == scales.prompts_sha256), None)
        if fitting is None:
            raise StudyError(
                f"the prompts that {candidate.name} was calibrated on, {scales.prompts_file!r} "
                f"with SHA-256 {scales.prompts_sha256[:12]}…, are not to be found, so nobody can "
                "say whether these are others: give their file with --calibration-prompts"
            )
        _check_apart(prompts, fitting.prompts, f"the calibration of {candidate.name}")
    for each in given:
        _check_apart(prompts, each.prompts, each.file)
    for folder in analyses:
        points = StudyFolder.finished(folder, "analyze").identity["set of points"]
        _check_apart(prompts, json.loads(points)["prompts"], f"the analysis {folder}")


def _found(candidate: Candidate, model: Path) -> Iterator[PromptSet]:
    name = Path(candidate.scales.prompts_file)
    folders = (model, candidate.source, candidate.source.parent)
    for path in (name, *(folder / name.name for folder in folders)):
        if path.is_file():
            try:
                yield PromptSet.read(path)
            except CalibrationError:  # another file that has this name
                continue


def _check_apart(prompts: PromptSet, seen: Sequence[str], what: str) -> None:
    shared = [prompt for prompt in prompts.prompts if prompt in set(seen)]
    if shared:
        raise StudyError(
            f"{len(shared)} prompts of {prompts.file} were also in {what}, the first being "
            f"{shared[0]!r}: evaluate on prompts that have chosen nothing"
        )
