"""UniPC, Wan's own scheduler, with its coefficients computed on the host.

diffusers computes them on the device, from noise levels that are on the host, and solves a system
of two equations there. Ascend has no kernel for that: each step would wait for the device, and copy
the system to the host and back. Here only the arithmetic on latents is on the device. Numbers from
the host enter it as scalars, which need no copy. On the CPU the results are diffusers' own, to the
last bit.

The method: https://arxiv.org/abs/2302.04867. Steps and names are those of diffusers' class.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UniPCMultistepScheduler
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Coefficients:
    """The numbers of one update, as tensors [] on the host, and a system of equations.

    Attributes:
        sample: multiplies the sample that the update starts from.
        model: multiplies the model's last output.
        change: multiplies the sum of the changes between outputs.
        ratios: divide the change since each earlier output, [order - 1].
        matrix: [order, order].
        right: [order].
    """

    sample: Tensor
    model: Tensor
    change: Tensor
    ratios: list[Tensor]
    matrix: Tensor
    right: Tensor


class HostUniPC(UniPCMultistepScheduler):  # type: ignore[misc]  # diffusers is untyped to mypy here
    """A UniPC that computes nothing but latents on their device."""

    def multistep_uni_p_bh_update(
        self, model_output: Tensor, *, sample: Tensor, order: int, **_: Any
    ) -> Tensor:
        """Predict the next sample from `sample`, like the method of diffusers."""
        if self.solver_p:
            start = self.timestep_list[-1]
            solved: Tensor = self.solver_p.step(model_output, start, sample).prev_sample
            return solved
        numbers = self._coefficients(self.step_index + 1, order)
        weights = torch.full((1,), 0.5)  # what order 2 is given in place of the system's solution
        if order > 2:
            weights = torch.linalg.solve(numbers.matrix[:-1, :-1], numbers.right[:-1])
        moved: Tensor = numbers.sample * sample - numbers.model * self.model_outputs[-1]
        result = moved - numbers.change * self._changes(numbers, weights)
        return result.to(sample.dtype)

    def multistep_uni_c_bh_update(
        self, this_model_output: Tensor, *, last_sample: Tensor, order: int, **_: Any
    ) -> Tensor:
        """Correct the sample predicted from `last_sample`, like the method of diffusers."""
        numbers = self._coefficients(self.step_index, order)
        weights = torch.full((1,), 0.5)
        if order > 1:
            weights = torch.linalg.solve(numbers.matrix, numbers.right)
        last_output: Tensor = self.model_outputs[-1]
        moved = numbers.sample * last_sample - numbers.model * last_output
        changes = self._changes(numbers, weights[:-1])
        latest = weights[-1] * (this_model_output - last_output)
        return (moved - numbers.change * (changes + latest)).to(last_sample.dtype)

    def _changes(self, numbers: Coefficients, weights: Tensor) -> Tensor | int:
        """Add up the weighted changes between the model's outputs; 0 if there is only one."""
        last: Tensor = self.model_outputs[-1]
        changes: list[Tensor] = [
            (self.model_outputs[-(back + 2)] - last) / ratio
            for back, ratio in enumerate(numbers.ratios)
        ]
        if not changes:
            return 0
        if len(changes) == 1:  # Wan's order: no copy of weights to the device
            return weights[0] * changes[0]
        on_device = weights.to(last.device, last.dtype, non_blocking=True)
        return torch.einsum("k,bkc...->bc...", on_device, torch.stack(changes, dim=1))

    def _coefficients(self, target: int, order: int) -> Coefficients:
        """Compute the numbers of an update to the noise level `target` from the one before."""
        alpha_t, sigma_t = self._sigma_to_alpha_sigma_t(self.sigmas[target])
        alpha_s0, sigma_s0 = self._sigma_to_alpha_sigma_t(self.sigmas[target - 1])
        lambda_s0 = torch.log(alpha_s0) - torch.log(sigma_s0)
        h = torch.log(alpha_t) - torch.log(sigma_t) - lambda_s0
        ratios = []
        for back in range(2, order + 1):
            alpha, sigma = self._sigma_to_alpha_sigma_t(self.sigmas[target - back])
            ratios.append((torch.log(alpha) - torch.log(sigma) - lambda_s0) / h)
        hh = -h if self.predict_x0 else h
        h_phi_1 = torch.expm1(hh)
        b_h = hh if self.config.solver_type == "bh1" else h_phi_1
        matrix, right = _system(torch.stack([*ratios, torch.ones(())]), hh, h_phi_1, b_h)
        if self.predict_x0:
            sample, scale = sigma_t / sigma_s0, alpha_t
        else:
            sample, scale = alpha_t / alpha_s0, sigma_t
        return Coefficients(sample, scale * h_phi_1, scale * b_h, ratios, matrix, right)


def _system(ratios: Tensor, hh: Tensor, h_phi_1: Tensor, b_h: Tensor) -> tuple[Tensor, Tensor]:
    rows, right = [], []
    h_phi_k, factorial = h_phi_1 / hh - 1, 1
    for power in range(len(ratios)):
        rows.append(torch.pow(ratios, power))
        right.append(h_phi_k * factorial / b_h)
        factorial *= power + 2
        h_phi_k = h_phi_k / hh - 1 / factorial
    return torch.stack(rows), torch.stack(right)
