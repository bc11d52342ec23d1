"""Measure a student on held-out points, and on held-out clips where it is trained on clips."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from quant.studies.methods.method import Method
from quant.studies.qat.captured import Captured
from quant.studies.qat.samples import Samples, relative_error
from quant.studies.qat.straight_through import StaticScale
from quant.studies.qat.student import Student

Measured = dict[str, list[float]]
"""Values by measure: "velocity", the error energy of each point; "flow", the loss of each clip at
each noise level."""

MEASURED_TOGETHER = 16
"""Points or clips that are measured together."""


@dataclass(slots=True)
class Ruler:
    """Measures one student under several methods.

    Attributes:
        samples: by measure, what is measured on.
        methods: by name, with the static scales of their inputs.
        capture: as `Trainer`'s.
    """

    student: Student
    samples: Mapping[str, Samples]
    methods: Mapping[str, tuple[Method, Mapping[str, StaticScale | None]]]
    capture: bool
    _buffers: dict[str, Samples] = field(init=False, default_factory=dict)
    _passes: dict[tuple[str, str], Captured] = field(init=False, default_factory=dict)

    def measure(self, methods: Sequence[str]) -> dict[str, Measured] | None:
        """Measure the student's weights, as a file would hold them, by method.

        Returns:
            None if a value is not finite: the training has diverged.
        """
        found = {}
        with self.student.as_stored():
            for method in methods:
                found[method] = {name: self._values(name, method) for name in self.samples}
        finite = all(
            torch.tensor(values).isfinite().all()
            for each in found.values()
            for values in each.values()
        )
        return found if finite else None

    @torch.no_grad()
    def _values(self, measure: str, method: str) -> list[float]:
        every = self.samples[measure]
        count = len(every.timestep)
        size = min(MEASURED_TOGETHER, count)
        if measure not in self._buffers:
            self._buffers[measure] = every.rows(range(size)).to(self.student.device)
        buffer, run = self._buffers[measure], self._pass(measure, method)
        found: list[Tensor] = []
        for start in range(0, count, size):
            # The last batch is filled up with the first samples, so that all are of one size.
            buffer.copy_(every.rows([place % count for place in range(start, start + size)]))
            found.append(run().clone())
        return [float(each) for each in torch.cat(found)[:count].cpu()]

    def _pass(self, measure: str, method: str) -> Captured:
        key = (measure, method)
        if key not in self._passes:
            chosen, scales = self.methods[method]
            buffer = self._buffers[measure]

            def work() -> Tensor:
                self.student.quantize_as(chosen, scales)
                with torch.no_grad():
                    found = self.student.velocity(buffer.latents, buffer.timestep, buffer.text)
                    if measure == "velocity":
                        return relative_error(found, buffer.target)
                    return (found - buffer.target).square().flatten(1).mean(1)

            self._passes[key] = Captured(work, self.student.device, capture=self.capture)
        return self._passes[key]
