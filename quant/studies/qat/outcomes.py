"""Compare each training with PTQ, and with PTQ after the same training in BF16.

Two questions, each with its own correction over all cells: does the trained model do better than
the untrained one under the same method, and does it do better than a model that was trained alike
without the method and then quantized? Only the second says that training through the rounding
helped, and not training itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from quant.studies.output.study_folder import Json, StudyFolder
from quant.studies.qat.grid import CONTROL, Grid, Run
from quant.studies.qat.session import measured_ptq, measured_run, run_unit
from quant.studies.statistics import DRAWS, Difference, estimate, holm, paired_difference

ALPHA = 0.05
BETTER, WORSE, UNSURE, DIVERGED = "better", "worse", "not told apart", "diverged"
FACTORS = ("learning_rate", "step", "batch", "data", "seed")


@dataclass(frozen=True, slots=True)
class Outcome:
    """A study whose units are all kept.

    Attributes:
        owners: by measure, the prompt, or caption, that each value belongs to.
        loss: name of the loss of training.
        recipe: in words, for the page.
    """

    folder: StudyFolder
    grid: Grid
    owners: Mapping[str, Sequence[str]]
    loss: str
    recipe: str

    @property
    def measures(self) -> tuple[str, ...]:
        """What is measured, the aim of training first."""
        order = ("flow", "velocity") if self.loss == "flow" else ("velocity",)
        return tuple(name for name in order if name in self.owners)

    def results(self) -> Json:
        """Compute everything that the report shows."""
        methods = (CONTROL, *self.grid.methods)
        return {
            "loss": self.loss,
            "recipe": self.recipe,
            "steps": list(self.grid.steps),
            "methods": list(self.grid.methods),
            "measures": {
                name: {"prompts": len(set(self.owners[name])), "values": len(self.owners[name])}
                for name in self.measures
            },
            "ptq": {
                method: {
                    name: self._estimate(name, self._ptq(method, name)) for name in self.measures
                }
                for method in methods
            },
            "controls": [self._control(run, step) for run, step in self._each(self.grid.controls)],
            "cells": self._cells(),
        }

    def _each(self, runs: Sequence[Run]) -> list[tuple[Run, int]]:
        return [(run, step) for run in runs for step in self.grid.steps]

    def _control(self, run: Run, step: int) -> Json:
        found: Json = _options(run, step)
        for measure in self.measures:
            found[measure] = {
                method: self._estimate(measure, values)
                for method in (CONTROL, *self.grid.methods)
                if (values := self._run(run, step, measure, method)) is not None
            }
        found["diverged"] = not found[self.measures[0]]
        return found

    def _cells(self) -> list[Json]:
        cells = []
        for run, step in self._each(self.grid.runs):
            cell = _options(run, step)
            unit: Any = self.folder.unit(run_unit(run, step))
            cell["diverged"] = "diverged" in unit
            cell["training_loss"] = unit.get("loss")
            cells.append(cell)
        for measure in self.measures:
            self._compare(cells, measure)
        return cells

    def _compare(self, cells: Sequence[Json], measure: str) -> None:
        """Add the estimates and differences of a measure to all cells."""
        against: dict[str, dict[str, Difference]] = {"ptq": {}, "control": {}}
        for number, (run, step) in enumerate(self._each(self.grid.runs)):
            values = self._run(run, step, measure, run.method)
            if values is None:
                cells[number][measure] = None
                continue
            found = self._estimate(measure, values)
            before = self._ptq(run.method, measure)
            found["gain_db"] = _gain_db(float(np.mean(before)), found["mean"])
            cells[number][measure] = found
            alike = self._run(run.control, step, measure, run.method)
            for name, other in (("ptq", before), ("control", alike)):
                if other is not None:
                    difference = paired_difference(values, other, self.owners[measure])
                    against[name][str(number)] = difference
        for name, differences in against.items():
            adjusted = holm({key: each.permutation_p for key, each in differences.items()})
            for key, each in differences.items():
                cells[int(key)][measure][f"against_{name}"] = {
                    **asdict(each),
                    "holm_p": adjusted[key],
                    "outcome": _outcome(each, adjusted[key]),
                }

    def _ptq(self, method: str, measure: str) -> list[float]:
        return measured_ptq(self.folder, method)[measure]

    def _run(self, run: Run, step: int, measure: str, method: str) -> list[float] | None:
        found = measured_run(self.folder, run, step, method)
        return None if found is None else found[measure]

    def _estimate(self, measure: str, values: Sequence[float]) -> Json:
        return asdict(estimate(values, self.owners[measure]))


def outcome_of(cell: Json, measure: str, against: str = "ptq") -> str:
    """Say in a word how a cell compares with PTQ, or with the control."""
    if cell["diverged"]:
        return DIVERGED
    other = cell[measure].get(f"against_{against}")
    return UNSURE if other is None else str(other["outcome"])


def counted(cells: Sequence[Json], measure: str) -> dict[str, int]:
    """Count cells by how they compare with PTQ."""
    found = [outcome_of(cell, measure) for cell in cells]
    return {name: found.count(name) for name in (BETTER, WORSE, UNSURE, DIVERGED)}


def best_cell(cells: Sequence[Json], measure: str) -> Json | None:
    """Return the cell with the least mean; None if all have diverged."""
    alive = [cell for cell in cells if not cell["diverged"]]
    return min(alive, key=lambda cell: float(cell[measure]["mean"]), default=None)


def too_few(results: Json, measure: str) -> bool:
    """Return whether no difference could be called real, with so many cells and so few prompts."""
    prompts, tests = results["measures"][measure]["prompts"], len(results["cells"])
    smallest = max(2.0 ** (1 - prompts), 1 / (DRAWS + 1) if prompts > 13 else 0.0)
    return bool(tests * smallest >= ALPHA)


def _options(run: Run, step: int) -> Json:
    options = asdict(run)
    return {**options, "step": step}


def _outcome(difference: Difference, holm_p: float) -> str:
    if not difference.is_real or holm_p >= ALPHA:
        return UNSURE
    return BETTER if difference.mean < 0 else WORSE


def _gain_db(before: float, after: float) -> float | None:
    return float(10 * np.log10(before / after)) if before > 0 and after > 0 else None
