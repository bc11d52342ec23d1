"""Euler's method over evenly spaced noise levels, for models that were distilled to few steps.

A distilled model has learned to step between a few noise levels only. Before the shift these are
spaced evenly from 1: for four steps 1, 3/4, 1/2 and 1/4. A `WanPipeline` gives its scheduler only
the number of steps, and diffusers' Euler then spaces them down to its smallest trained level, which
for four steps of shift 5 would be 1, 0.91, 0.72 and 0.02 instead of 1, 0.94, 0.83 and 0.63.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor


class EvenFlowEuler(FlowMatchEulerDiscreteScheduler):  # type: ignore[misc]  # untyped to mypy here
    """diffusers' Euler with evenly spaced levels.

    Attributes:
        predicted: the end [1, C, F, H, W] as the model's latest output predicts it, in float32;
            None before the first step.
    """

    predicted: Tensor | None = None

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        """Set the noise levels and timesteps of a run."""
        levels = np.linspace(1, 0, num_inference_steps, endpoint=False)
        super().set_timesteps(sigmas=levels, device=device)
        self.predicted = None

    def step(
        self, model_output: Tensor, timestep: Tensor, sample: Tensor, return_dict: bool = True
    ) -> Any:
        """Step to the next noise level, like the method of diffusers."""
        if self.step_index is None:
            self._init_step_index(timestep)
        level = self.sigmas[self.step_index]
        self.predicted = sample.to(torch.float32) - level * model_output
        return super().step(model_output, timestep, sample, return_dict=return_dict)
