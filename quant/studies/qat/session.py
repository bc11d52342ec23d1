"""Run a study: measure PTQ, then train run after run and measure each at its numbers of steps."""

from __future__ import annotations

import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quant.errors import StudyError
from quant.studies.output.pipeline_folder import write_with_transformer
from quant.studies.output.study_folder import StudyFolder
from quant.studies.progress import StudyProgress
from quant.studies.qat.cost import Cost, measured_methods
from quant.studies.qat.grid import CONTROL, Run
from quant.studies.qat.measure import Measured, Ruler
from quant.studies.qat.student import Student
from quant.studies.qat.training import Trainer
from quant.weights.writer import to_bytes, write_whole

_STATE = "training.safetensors"


@dataclass(slots=True)
class Session:
    """A study while it runs.

    Attributes:
        exported_run: the run whose transformer is written in the end; None for a grid.
        model: the pipeline's folder, whose other components go into the new one.
        checkpoint_s: seconds after which a run's state is written to disk again.
    """

    student: Student
    trainer: Trainer
    ruler: Ruler
    cost: Cost
    folder: StudyFolder
    model: Path
    exported_run: Run | None
    checkpoint_s: float

    def run(self, progress: StudyProgress) -> None:
        """Do all that the folder lacks.

        Raises:
            StudyError: PTQ's velocity is not finite, or the disk is full.
        """
        self._measure_ptq(progress)
        for number, run in enumerate(self.cost.grid.ordered, start=1):
            progress.describe(f"run {number} of {len(self.cost.grid.ordered)}, {run.name}")
            self._train(run, progress)
        (self.folder.path / _STATE).unlink(missing_ok=True)

    def _measure_ptq(self, progress: StudyProgress) -> None:
        self.student.reset()
        for method in (CONTROL, *self.cost.grid.methods):
            unit = ptq_unit(method)
            if self.folder.unit(unit) is not None:
                progress.skip(self.cost.measurement)
                continue
            progress.describe(f"PTQ, {method}")
            found = self.ruler.measure((method,))
            if found is None:
                raise StudyError(
                    f"the velocity of {method} without training has NaN or infinity: check the "
                    "model's weights with `python -m quant calibrate`, which names the layer"
                )
            self.folder.keep(unit, found[method])
            progress.advance(self.cost.measurement)

    def _train(self, run: Run, progress: StudyProgress) -> None:
        marks = self.cost.grid.steps
        kept = [self.folder.unit(run_unit(run, mark)) for mark in marks]
        if any(unit is not None and "diverged" in unit for unit in kept):
            self._give_up(run)  # a kill may have come between two of its marks
            progress.skip(self.cost.run(run))
            return
        if None not in kept:
            progress.skip(self.cost.run(run))
            return
        state = self.folder.path / _STATE
        method, scales = self.ruler.methods[run.method]
        self.trainer.begin(run, method, dict(scales))
        self.trainer.restore(state)
        progress.skip(self.cost.step(run) * self.trainer.done)
        progress.skip(self.cost.mark(run) * sum(mark <= self.trainer.done for mark in marks))
        saved = time.monotonic()
        while self.trainer.done < marks[-1]:
            self.trainer.step()
            progress.advance(self.cost.step(run))
            if self.trainer.done in marks:
                if not self._mark(run, self.trainer.done):
                    self._skip_rest(run, progress)
                    return
                progress.advance(self.cost.mark(run))
            if time.monotonic() - saved > self.checkpoint_s and self.trainer.done < marks[-1]:
                self.trainer.save(state)
                saved = time.monotonic()

    def _mark(self, run: Run, step: int) -> bool:
        """Measure the student and keep it; return False if the training has diverged."""
        earlier = max((mark for mark in self.cost.grid.steps if mark < step), default=0)
        loss = self.trainer.take_loss() / (step - earlier)
        unit = run_unit(run, step)
        if self.folder.unit(unit) is not None:
            return True
        found = (
            self.ruler.measure(measured_methods(self.cost.grid, run))
            if math.isfinite(loss)
            else None
        )
        if found is None:
            self._give_up(run)
            return False
        if run == self.exported_run and step == self.cost.grid.steps[-1]:
            self._export()
        self.folder.keep(unit, {"loss": loss, "measured": found})
        return True

    def _give_up(self, run: Run) -> None:
        """Keep of all marks that have no unit that the run has diverged."""
        for mark in self.cost.grid.steps:
            if self.folder.unit(run_unit(run, mark)) is None:
                self.folder.keep(run_unit(run, mark), {"diverged": True})

    def _export(self) -> None:
        """Write the pipeline with the trained transformer, and the adapters if there are any."""
        out = self.folder.path / "model"
        if out.exists():  # of an earlier attempt that was ended right after it was written
            shutil.rmtree(out)
        write_with_transformer(self.model, self.student.exported(), out)
        adapters = self.student.adapters()
        if not adapters:
            return
        target = self.folder.path / "adapter"
        try:
            target.mkdir(exist_ok=True)
            file = target / "pytorch_lora_weights.safetensors"
            write_whole(file, to_bytes(adapters, {"format": "pt"}))
        except OSError as error:
            raise StudyError(f"cannot write {target}: {error.strerror or error}") from error

    def _skip_rest(self, run: Run, progress: StudyProgress) -> None:
        """Count what a run that has diverged will not do."""
        marks = self.cost.grid.steps
        left = marks[-1] - self.trainer.done
        later = sum(mark >= self.trainer.done for mark in marks)
        progress.skip(self.cost.step(run) * left + self.cost.mark(run) * later)


def ptq_unit(method: str) -> str:
    """Return the name of the unit that holds what a method measures without training."""
    return f"ptq/{method}"


def run_unit(run: Run, step: int) -> str:
    """Return the name of the unit that holds what a run measures at a number of steps."""
    return f"{run.name}/{step}"


def measured_ptq(folder: StudyFolder, method: str) -> Measured:
    """Return what a method measures without training."""
    unit: Any = folder.unit(ptq_unit(method))
    return dict(unit)


def measured_run(
    folder: StudyFolder, run: Run, step: int, method: str | None = None
) -> Measured | None:
    """Return what a run measures at a number of steps; None if it has diverged.

    Args:
        method: another than the run's own, for controls.
    """
    unit: Any = folder.unit(run_unit(run, step))
    return None if "diverged" in unit else dict(unit["measured"][method or run.method])
