"""Record points: run prompts as a job would, keep what the transformer is given at some steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quant.calibration.prompts import PromptSet
from quant.calibration.sampler import SamplerSettings
from quant.calibration.sampling import OnStep, check_pipeline, run_prompts
from quant.errors import StudyError
from quant.studies.points import PointsFolder


def spread_steps(count: int, steps: int) -> tuple[int, ...]:
    """Choose `count` of the numbers 0 to `steps` − 1, evenly: the middle of each of equal parts.

    Raises:
        StudyError: there are fewer steps.
    """
    if not 1 <= count <= steps:
        raise StudyError(f"{count} steps to keep must be between 1 and the {steps} that are run")
    return tuple((2 * part + 1) * steps // (2 * count) for part in range(count))


def record_points(
    pipe: Any,
    prompts: PromptSet,
    sampler: SamplerSettings,
    folder: PointsFolder,
    on_step: OnStep,
) -> None:
    """Run the prompts that the folder lacks through a `WanPipeline` in BF16, and keep their points.

    As many prompts run together as the folder was made for. Those of a batch that an interrupted
    run has kept in part run again together, because the last bits may depend on the company.

    Args:
        folder: made for these prompts and settings.
        on_step: called after each denoising step with (done, total), counted over all prompts;
            before the first one, too.

    Raises:
        CalibrationError: as `check_pipeline`.
        StudyError: a tensor is not finite, or cannot be written.
    """
    check_pipeline(pipe, prompts.prompts, sampler)
    pipe.set_progress_bar_config(disable=True)
    count, steps, batch = len(prompts.prompts), sampler.num_inference_steps, folder.info.batch
    batches = [range(first, min(first + batch, count)) for first in range(0, count, batch)]
    missing = [each for each in batches if not all(folder.has(index) for index in each)]
    total = steps * count
    done = total - steps * sum(map(len, missing))
    on_step(done, total)
    for each in missing:
        inputs = _Inputs(folder.info.steps)

        def after_step(
            step: int, inputs: _Inputs = inputs, before: int = done, size: int = len(each)
        ) -> None:
            inputs.step = step + 1
            on_step(before + size * (step + 1), total)

        texts = [prompts.prompts[index] for index in each]
        seeds = [sampler.seed + index for index in each]
        handle = pipe.transformer.register_forward_pre_hook(inputs.take, with_kwargs=True)
        try:
            with torch.no_grad():
                run_prompts(pipe, texts, seeds, sampler, after_step)
        finally:
            handle.remove()
        for place, index in enumerate(each):
            if not folder.has(index):
                folder.write(index, inputs.tensors(place))
        done += steps * len(each)


class _Inputs:
    """Collects what the transformer is given in the wanted steps of some prompts."""

    def __init__(self, wanted: tuple[int, ...]) -> None:
        self.step = 0
        self._wanted = frozenset(wanted)
        self._latents: dict[int, Tensor] = {}
        self._timesteps: dict[int, Tensor] = {}
        self._texts: list[Tensor] = []

    def take(self, _module: Any, _args: Any, given: dict[str, Any]) -> None:
        """Keep the inputs of a pass: the first of a step is the prompts', the second negative."""
        if self.step == 0 and len(self._texts) < 2:
            self._texts.append(given["encoder_hidden_states"].detach().cpu())
        if self.step in self._wanted:
            self._latents[self.step] = given["hidden_states"].detach().float().cpu()
            self._timesteps[self.step] = given["timestep"].detach().float().cpu()

    def tensors(self, place: int) -> dict[str, Tensor]:
        """Return the tensors of one of the prompts as `PointsFolder.write` takes them."""
        order = sorted(self._latents)
        own = [each[place].clone() for each in self._texts]
        texts = dict(zip(("prompt", "negative"), own, strict=False))
        return {
            "latents": torch.stack([self._latents[step][place] for step in order]),
            "timesteps": torch.stack([self._timesteps[step][place] for step in order]),
            **texts,
        }
