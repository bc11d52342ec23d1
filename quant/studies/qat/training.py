"""Train the student for one run: AdamW with a constant learning rate after a short warm-up.

The optimizer's state is kept in a file from time to time, and a run that goes on from there gives
the same weights as one that was never interrupted, bit by bit on a CPU.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from quant.errors import StudyError
from quant.studies.methods.method import Method
from quant.studies.qat.captured import Captured
from quant.studies.qat.grid import Run
from quant.studies.qat.samples import Lesson, Samples
from quant.studies.qat.straight_through import StaticScale
from quant.studies.qat.student import Student
from quant.weights.writer import to_bytes, write_whole

WARM_UP_STEPS = 10
_CLIP_NORM = 1.0
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


@dataclass(slots=True)
class Trainer:
    """Trains a student; create one for a study, and `begin` each run.

    Attributes:
        capture: replay steps as CUDA graphs, where the device is a GPU.
    """

    student: Student
    lesson: Lesson
    capture: bool
    _rate: Tensor = field(init=False)
    _loss_sum: Tensor = field(init=False)
    _adam: torch.optim.AdamW = field(init=False)
    _samples: Samples | None = field(init=False, default=None)
    _step: Captured | None = field(init=False, default=None)
    _shape: tuple[str, int] | None = field(init=False, default=None)
    _run: Run | None = field(init=False, default=None)
    _done: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        """Make the optimizer, which all runs share."""
        device = self.student.device
        self._rate = torch.zeros((), device=device)
        self._loss_sum = torch.zeros((), device=device)
        self._adam = torch.optim.AdamW(
            list(self.student.trained.values()),
            lr=self._rate,
            weight_decay=0.0,  # it would pull the weights away from the original's
            capturable=device.type == "cuda",
            fused=device.type == "cuda",
        )

    def begin(self, run: Run, method: Method, scales: dict[str, StaticScale | None]) -> None:
        """Prepare a run from the original's weights.

        Args:
            method: of the run.
            scales: static scales of its inputs.
        """
        student = self.student
        if self._shape != (run.method, run.batch):
            self._step = None  # frees the last one's memory before there is another
            self._samples = self.lesson.batch(run.seed, 0, run.batch, run.data).to(student.device)

            def work() -> None:
                student.quantize_as(method, scales)
                self._learn()

            self._step = Captured(work, student.device, capture=self.capture)
            self._rate.zero_()
            student.reset()
            self._step.prepare()
            self._shape = (run.method, run.batch)
        student.reset()
        self._run, self._done = run, 0
        for state in self._adam.state.values():
            for tensor in state.values():
                tensor.zero_()
        self._loss_sum.zero_()

    @property
    def done(self) -> int:
        """How many steps of the run are done."""
        return self._done

    def step(self) -> None:
        """Make one step."""
        run = self._run
        assert run is not None, "a run begins first"
        assert self._step is not None
        assert self._samples is not None
        self._samples.copy_(self.lesson.batch(run.seed, self._done, run.batch, run.data))
        self._rate.fill_(run.learning_rate * min(1.0, (self._done + 1) / WARM_UP_STEPS))
        self._step()
        self._done += 1

    def take_loss(self) -> float:
        """Return the sum of the losses since the last call; not finite if training diverged."""
        found = float(self._loss_sum)
        self._loss_sum.zero_()
        return found

    def _learn(self) -> None:
        student, samples = self.student, self._samples
        assert samples is not None
        for parameter in student.trained.values():
            parameter.grad = None
        with student.mixed():
            found = student.velocity(samples.latents, samples.timestep, samples.text)
        loss = self.lesson.loss(found, samples.target)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(
            list(student.trained.values()), _CLIP_NORM, foreach=student.device.type == "cuda"
        )
        self._adam.step()
        self._loss_sum += loss.detach()

    def save(self, path: Path) -> None:
        """Keep the run's state in a file, which replaces an older one.

        Raises:
            StudyError: the disk cannot take it.
        """
        assert self._run is not None
        tensors: dict[str, Tensor] = {"loss_sum": self._loss_sum}
        for name, parameter in self.student.trained.items():
            tensors[f"{name}:weight"] = parameter
            for moment, value in self._adam.state.get(parameter, {}).items():
                tensors[f"{name}:{moment}"] = value
        try:
            write_whole(path, to_bytes(tensors, {"run": self._run.name, "done": str(self._done)}))
        except OSError as error:
            raise StudyError(
                f"cannot write {path}: {error.strerror or error}; make room for it, and the same "
                "command goes on from the last file that was written"
            ) from error

    def restore(self, path: Path) -> bool:
        """Go on from a file, if it is of this run; return whether it is.

        Raises:
            StudyError: the file is damaged.
        """
        assert self._run is not None
        if not path.exists():
            return False
        try:
            with safe_open(path, "pt", device=str(self.student.device)) as file:
                facts = file.metadata()
                if facts["run"] != self._run.name:
                    return False
                self._take(file)
                self._done = int(facts["done"])
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise StudyError(
                f"{path} cannot be read: delete it, and the same command trains this run anew"
            ) from error
        return True

    @torch.no_grad()
    def _take(self, file: Any) -> None:
        self._loss_sum.copy_(file.get_tensor("loss_sum"))
        for name, parameter in self.student.trained.items():
            parameter.copy_(file.get_tensor(f"{name}:weight"))
            state = self._adam.state[parameter]
            for moment in _MOMENTS:
                value = file.get_tensor(f"{name}:{moment}")
                if moment in state:  # in place: a captured step uses the tensors it has
                    state[moment].copy_(value)
                else:
                    state[moment] = value
