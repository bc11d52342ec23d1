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
    analyzed = [_of_analysis(folder) for folder in analyses]
    for candidate in candidates:
        for sha256, file, what in _seen_by(candidate):
            if sha256 == prompts.sha256:
                raise StudyError(
                    f"{prompts.file} holds the very prompts that {what}: evaluate on others"
                )
            known = [*given, *analyzed, *_found(file, candidate, model)]
            fitting = next((each for each in known if each.sha256 == sha256), None)
            if fitting is None:
                raise StudyError(
                    f"the prompts that {what}, {file!r} with SHA-256 {sha256[:12]}…, are not to "
                    "be found, so nobody can say whether these are others: give their file with "
                    "--calibration-prompts"
                )
            _check_apart(prompts, fitting.prompts, f"those that {what}")
    for each in given:
        _check_apart(prompts, each.prompts, each.file)
    for each in analyzed:
        _check_apart(prompts, each.prompts, each.file)


def _seen_by(candidate: Candidate) -> Iterator[tuple[str, str, str]]:
    """Yield hash, file and use of the sets of prompts that made a candidate what it is."""
    scales = candidate.scales
    if scales.num_prompts:
        what = f"{candidate.name} was calibrated on"
        yield scales.prompts_sha256, scales.prompts_file, what
    if scales.protection is not None:
        what = f"chose the protected blocks of {candidate.name}"
        yield scales.protection.prompts_sha256, scales.protection.prompts_file, what


def _of_analysis(folder: Path) -> PromptSet:
    points = StudyFolder.finished(folder, "analyze").identity["set of points"]
    return PromptSet(tuple(json.loads(points)["prompts"]), f"the analysis {folder}")


def _found(file: str, candidate: Candidate, model: Path) -> Iterator[PromptSet]:
    name = Path(file)
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
