"""Say what a study will take before it begins, in passes of one block with one sample."""

from __future__ import annotations

from dataclasses import dataclass

from quant.studies.qat.grid import CONTROL, Grid, Run

_PASSES_OF_A_STEP = 3  # backward counts twice


@dataclass(frozen=True, slots=True)
class Cost:
    """The cost of a study's parts.

    Attributes:
        measured: samples of one measurement.
        blocks: of the transformer.
    """

    grid: Grid
    measured: int
    blocks: int

    @property
    def measurement(self) -> int:
        """Of measuring the student under one method."""
        return self.blocks * self.measured

    @property
    def total(self) -> int:
        """Of measuring PTQ, and of all runs."""
        runs = sum(self.run(each) for each in self.grid.ordered)
        return runs + self.measurement * (1 + len(self.grid.methods))

    def run(self, run: Run) -> int:
        """Of one run."""
        steps = self.grid.steps
        return self.step(run) * steps[-1] + self.mark(run) * len(steps)

    def step(self, run: Run) -> int:
        """Of one step."""
        return _PASSES_OF_A_STEP * self.blocks * run.batch

    def mark(self, run: Run) -> int:
        """Of measuring a run once."""
        return self.measurement * len(measured_methods(self.grid, run))


def measured_methods(grid: Grid, run: Run) -> tuple[str, ...]:
    """Return what a run is measured under: a control also under each method, as PTQ after it."""
    return (CONTROL, *grid.methods) if run.method == CONTROL else (run.method,)
