"""Train the LoRA on recorded segments: AdamW, a short warm-up, then a cosine to zero.

Everything that a step draws follows from the seed and the step's number, so that a run that goes on
from a file gives the same weights as one that was never interrupted, bit by bit on a CPU.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import nn

from mini.distillation.adapters import Adapters
from mini.distillation.schedule import Schedule
from mini.distillation.settings import DistillError, DistillSettings
from mini.distillation.trajectories import Trajectories, velocity

_WARM_UP = 0.02
_CLIP_NORM = 1.0
PASSES_OF_A_STEP = 3  # backward counts twice


class Training:
    """The LoRA with its optimizer.

    Attributes:
        done: how many steps are done.
        losses: the mean loss of the steps between two calls of `save`, with their last number.
    """

    def __init__(
        self, transformer: WanTransformer3DModel, schedule: Schedule, settings: DistillSettings
    ) -> None:
        self._transformer, self._schedule, self._settings = transformer, schedule, settings
        self.adapters = Adapters(transformer, settings.rank, settings.seed)
        self._adam = torch.optim.AdamW(
            self.adapters.trained.parameters(), betas=(0.9, 0.98), weight_decay=0.0
        )
        self.done = 0
        self.losses: list[tuple[int, float]] = []
        self._loss_sum = torch.zeros((), device=transformer.device)
        self._summed = 0

    def step(self, recorded: Trajectories) -> None:
        """Make one step on random segments of random trajectories."""
        settings, device = self._settings, recorded.states.device
        draw = torch.Generator().manual_seed(settings.seed * settings.steps + self.done)
        size = (settings.batch,)
        which = torch.randint(len(recorded), size, generator=draw).to(device)
        segment = torch.randint(len(self._schedule), size, generator=draw).to(device)
        found = velocity(
            self._transformer,
            recorded.states[which, segment],
            self._schedule.timesteps[segment],
            recorded.text[which],
            self.adapters.merged(),
        )
        loss = (found - recorded.targets[which, segment].float()).square().mean()
        self._adam.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self.adapters.trained.parameters(), _CLIP_NORM)
        for group in self._adam.param_groups:
            group["lr"] = self._rate()
        self._adam.step()
        self._loss_sum += loss.detach()
        self._summed += 1
        self.done += 1

    def _rate(self) -> float:
        settings = self._settings
        warm = min(1.0, (self.done + 1) / max(1.0, _WARM_UP * settings.steps))
        cool = 0.5 + 0.5 * math.cos(math.pi * self.done / settings.steps)
        return settings.learning_rate * warm * cool

    def save(self, file: Path) -> None:
        """Keep everything to go on from in a file, which replaces an older one.

        Raises:
            DistillError: the loss is not finite; the older file stays.
        """
        if self._summed:
            loss = self._loss_sum.item() / self._summed
            if not math.isfinite(loss):
                raise DistillError(
                    f"the loss is {loss} before step {self.done}: start anew with another --work "
                    f"and a --learning-rate below {self._settings.learning_rate:g}"
                )
            self.losses.append((self.done, loss))
            self._loss_sum.zero_()
            self._summed = 0
        state = {
            "adapters": self.adapters.trained.state_dict(),
            "adam": self._adam.state_dict(),
            "done": self.done,
            "losses": self.losses,
        }
        unfinished = file.with_suffix(".part")
        torch.save(state, unfinished)
        unfinished.replace(file)

    def restore(self, file: Path) -> None:
        """Go on from a file of `save`."""
        state: dict[str, Any] = torch.load(
            file,
            map_location="cpu",
            weights_only=True,  # the optimizer moves what it wants there
        )
        self.adapters.trained.load_state_dict(state["adapters"])
        self._adam.load_state_dict(state["adam"])
        self.done, self.losses = state["done"], state["losses"]
