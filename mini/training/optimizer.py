"""Run optimizer steps for both training stages.

A step is captured as a CUDA graph if there is CUDA. The learning rate follows a schedule in time,
and the weights have an exponential moving average. The miniature is so small that launching kernels
takes longer than running them; replaying a captured step is several times faster (docs/log.md).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

WARM_UP_RUNS = 3
AVERAGE_DECAY = 0.999


class Optimizer:
    """AdamW with gradient clipping and a learning rate that depends on elapsed time.

    The rate rises over `warm_up_steps`, stays constant, and falls to zero over the last `cool_down`
    share of `seconds`. A run therefore ends with a rate of zero, whatever the machine's speed.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        peak_lr: float,
        seconds: float,
        warm_up_steps: int = 300,
        cool_down: float = 0.35,
    ) -> None:
        self.parameters: list[Tensor] = [p for p in parameters if p.requires_grad]
        self.average = [p.detach().clone() for p in self.parameters]
        self.seconds, self.peak_lr = seconds, peak_lr
        self.warm_up_steps, self.cool_down = warm_up_steps, cool_down
        self.steps, self.spent_s = 0, 0.0
        cuda = self.parameters[0].is_cuda
        self.lr = torch.zeros((), device=self.parameters[0].device)
        self._decay_gap = torch.ones((), device=self.parameters[0].device)
        decayed = [p for p in self.parameters if p.ndim > 1]
        not_decayed = [p for p in self.parameters if p.ndim <= 1]
        self.adam = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": 0.01},
                {"params": not_decayed, "weight_decay": 0.0},
            ],
            lr=self.lr,
            betas=(0.9, 0.98),
            capturable=cuda,
            fused=cuda,
        )
        self._last = time.monotonic()

    def tick(self) -> float:
        """Add the time since the last step, set the learning rate, return the progress in 0..1."""
        now = time.monotonic()
        self.spent_s += now - self._last
        self._last = now
        progress = min(1.0, self.spent_s / self.seconds)
        warm = min(1.0, (self.steps + 1) / self.warm_up_steps)
        cool = min(1.0, (1.0 - progress) / self.cool_down)
        self.lr.fill_(self.peak_lr * warm * math.sin(0.5 * math.pi * cool))
        # A short average at first: a constant decay would keep the random initial weights.
        self._decay_gap.fill_(1.0 - min(AVERAGE_DECAY, (1 + self.steps) / (10 + self.steps)))
        self.steps += 1
        return progress

    def pause(self) -> None:
        """Stop the clock until `resume`."""
        self.spent_s += time.monotonic() - self._last

    def resume(self) -> None:
        """Start the clock again."""
        self._last = time.monotonic()

    def apply(self) -> None:
        """Clip gradients, step, and update the average. Can be captured in a CUDA graph."""
        nn.utils.clip_grad_norm_(self.parameters, 1.0, foreach=True)
        self.adam.step()
        with torch.no_grad():  # otherwise the average keeps the autograd graph of all steps
            gaps = torch._foreach_sub(self.parameters, self.average)
            # A tensor on the device, so that a captured step uses the value that `tick` sets.
            torch._foreach_mul_(gaps, self._decay_gap)
            torch._foreach_add_(self.average, gaps)

    def swap_average(self) -> None:
        """Exchange the weights with their average; call twice around an evaluation."""
        with torch.no_grad():
            for parameter, average in zip(self.parameters, self.average, strict=True):
                weights = parameter.detach().clone()
                parameter.copy_(average)
                average.copy_(weights)

    def state(self) -> dict[str, object]:
        """Return everything that a later process needs to continue."""
        return {
            "adam": self.adam.state_dict(),
            "average": self.average,
            "steps": self.steps,
            "spent_s": self.spent_s,
        }

    def restore(self, state: dict[str, object]) -> None:
        """Continue from a value of `state()`."""
        saved_adam: dict[str, Any] = state["adam"]  # type: ignore[assignment]
        if moments := self.adam.state_dict()["state"]:
            # In place, because a captured step keeps using the tensors it was captured with.
            for index, values in saved_adam["state"].items():
                for name, value in values.items():
                    moments[index][name].copy_(value)
        else:
            self.adam.load_state_dict(saved_adam)
            for group in self.adam.param_groups:
                group["lr"] = self.lr
        with torch.no_grad():
            for average, saved in zip(self.average, state["average"], strict=True):  # type: ignore[call-overload]
                average.copy_(saved)
        self.steps, self.spent_s = int(state["steps"]), float(state["spent_s"])  # type: ignore[call-overload,arg-type]


class TrainingStep:
    """A callable that runs `loss_of()`, backward and optimizer; on CUDA a captured graph."""

    def __init__(self, loss_of: Callable[[], Tensor], optimizer: Optimizer) -> None:
        self._loss_of, self._optimizer = loss_of, optimizer
        self._graph: torch.cuda.CUDAGraph | None = None
        self.loss = torch.zeros(())
        if optimizer.parameters[0].is_cuda:
            self._capture()

    def __call__(self) -> None:
        """Run one step; `loss` is its loss afterwards, and reading it waits for the device."""
        if self._graph is None:
            self._run()
        else:
            self._graph.replay()

    def _run(self) -> None:
        for parameter in self._optimizer.parameters:
            parameter.grad = None
        self.loss = self._loss_of()
        torch.autograd.backward(self.loss)
        self._optimizer.apply()

    def _capture(self) -> None:
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_RUNS):
                self._run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._run()
        self._graph = graph
