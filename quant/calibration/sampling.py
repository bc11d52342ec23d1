"""Run prompts through a `WanPipeline` in BF16 as a job would, up to the latents of their videos."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quant.calibration.prompts import PromptSet
from quant.calibration.sampler import SamplerSettings
from quant.device import usable_device
from quant.errors import CalibrationError
from quant.weights.model_folder import check_model_kind

OnStep = Callable[[int, int], None]

_SHIFTS = ("flow_shift", "shift")
"""The names that diffusers' schedulers have for the shift of their noise levels."""


def load_pipeline(model_folder: Path, device: str) -> Any:
    """Load a `WanPipeline` in BF16 onto a device.

    Raises:
        CalibrationError: the folder does not load.
        WeightsError: it holds another kind of model than Wan2.1 text-to-video.
        QuantError: the device cannot be used.
    """
    if not (model_folder / "model_index.json").is_file():
        raise CalibrationError(
            f"{model_folder} holds no model_index.json: give the folder of a WanPipeline "
            "in diffusers format"
        )
    check_model_kind(model_folder)
    target = usable_device(device)
    # Takes seconds to import, so it is imported only when a model is really loaded.
    from diffusers import WanPipeline  # noqa: PLC0415

    try:
        pipe = WanPipeline.from_pretrained(model_folder, dtype=torch.bfloat16)
    except (OSError, ValueError) as error:
        raise CalibrationError(f"{model_folder} does not load as a WanPipeline: {error}") from error
    return pipe.to(target)


def make_latents(
    pipe: Any, prompts: PromptSet, sampler: SamplerSettings, count: int, on_step: OnStep
) -> list[Tensor]:
    """Run the first prompts through a `WanPipeline`; return the latents of their videos.

    Args:
        count: how many prompts.
        on_step: called after each denoising step with (done, total), counted over all of them.

    Returns:
        For each prompt [1, C, F, H, W], normalized, on the host.

    Raises:
        CalibrationError: as `check_pipeline`, or there are fewer prompts than `count`.
    """
    if count > len(prompts.prompts):
        raise CalibrationError(
            f"{prompts.file} holds {len(prompts.prompts)} prompts, fewer than the {count} videos "
            "asked for: add prompts, or ask for fewer videos"
        )
    check_pipeline(pipe, prompts.prompts[:count], sampler)
    pipe.set_progress_bar_config(disable=True)
    steps, found = sampler.num_inference_steps, list[Tensor]()
    for index in range(count):

        def after_step(step: int, done: int = index * steps) -> None:
            on_step(done + step + 1, count * steps)

        found.append(run_prompt(pipe, prompts, sampler, index, after_step).cpu())
    return found


def run_prompt(
    pipe: Any,
    prompts: PromptSet,
    sampler: SamplerSettings,
    index: int,
    after_step: Callable[[int], None],
) -> Tensor:
    """Run one prompt of a set; return the latents of its video, [1, C, F, H, W] normalized.

    Args:
        index: number of the prompt in its set, which also determines the seed.
        after_step: called after each denoising step with its number.
    """
    text, seed = prompts.prompts[index], sampler.seed + index
    return run_prompts(pipe, [text], [seed], sampler, after_step)


def run_prompts(
    pipe: Any,
    texts: Sequence[str],
    seeds: Sequence[int],
    sampler: SamplerSettings,
    after_step: Callable[[int], None],
) -> Tensor:
    """Run prompts together; return the latents of their videos, [prompts, C, F, H, W] normalized.

    A prompt's noise is the same in any company; its latents may differ in their last bits.

    Args:
        seeds: of each prompt's noise; the sampler's own is not used.
        after_step: called after each denoising step with its number.
    """

    def on_step_end(
        _pipe: Any, step: int, _timestep: Any, tensors: dict[str, Any]
    ) -> dict[str, Any]:
        after_step(step)
        return tensors

    width, height = sampler.size
    with _shifted(pipe, sampler.flow_shift):
        latents: Tensor = pipe(
            prompt=list(texts),
            negative_prompt=sampler.negative_prompt,
            width=width,
            height=height,
            num_frames=sampler.num_frames,
            num_inference_steps=sampler.num_inference_steps,
            guidance_scale=sampler.guidance_scale,
            max_sequence_length=sampler.text_tokens,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            output_type="latent",
            callback_on_step_end=on_step_end,
        ).frames
    return latents


@contextmanager
def _shifted(pipe: Any, shift: float | None) -> Iterator[None]:
    """Give a pipeline a scheduler of another flow shift within the context; None changes nothing.

    Raises:
        CalibrationError: its scheduler has no shift.
    """
    own = pipe.scheduler
    if shift is not None:
        name = next((each for each in _SHIFTS if each in own.config), None)
        if name is None:
            raise CalibrationError(
                f"flow shift {shift:g} cannot be set: the model's scheduler, a "
                f"{type(own).__name__}, has none; leave it out"
            )
        pipe.scheduler = type(own).from_config(own.config, **{name: shift})
    try:
        yield
    finally:
        pipe.scheduler = own


def check_pipeline(pipe: Any, prompts: Sequence[str], sampler: SamplerSettings) -> None:
    """Refuse what would end, or spoil, the run of a loaded pipeline, before it starts.

    Raises:
        CalibrationError: a prompt is too long, the scheduler has no shift to set, or a weight is
            not finite.
    """
    check_prompt_lengths(pipe.tokenizer, prompts, sampler)
    with _shifted(pipe, sampler.flow_shift):
        pass
    for part in ("text_encoder", "transformer"):
        check_finite_weights(getattr(pipe, part), part)


def check_finite_weights(module: nn.Module, part: str) -> None:
    """Refuse weights with NaN or infinity: everything after them would be NaN, too.

    Raises:
        CalibrationError: names the first such tensor.
    """
    names, largest = [], []
    for name, weight in module.named_parameters():
        names.append(name)
        low, high = weight.detach().aminmax()
        largest.append((high.float() - low.float()).cpu())
    for name, each in zip(names, torch.stack(largest).isfinite().tolist(), strict=True):
        if not each:
            raise CalibrationError(
                f"{name} of the {part.replace('_', ' ')} holds NaN or infinity: the model's files "
                "are damaged; copy them again"
            )


def load_tokenizer(model_folder: Path) -> Any:
    """Load only the tokenizer of a pipeline, to check prompts before the weights are read.

    Raises:
        CalibrationError: it does not load.
    """
    # Takes seconds to import, so it is imported only when prompts are really checked.
    from transformers import AutoTokenizer  # noqa: PLC0415

    try:
        return AutoTokenizer.from_pretrained(model_folder / "tokenizer")
    except (OSError, ValueError, KeyError) as error:
        raise CalibrationError(
            f"{model_folder / 'tokenizer'} does not load as a tokenizer: "
            f"{' '.join(str(error).split())}"
        ) from error


def check_prompt_lengths(tokenizer: Any, prompts: Sequence[str], sampler: SamplerSettings) -> None:
    """Reject prompts that the pipeline would truncate silently.

    Raises:
        CalibrationError: names the first prompt that is too long, its length and the limit.
    """
    limit = sampler.text_tokens
    for prompt in (sampler.negative_prompt, *prompts):
        tokens = len(tokenizer(prompt)["input_ids"])
        if tokens > limit:
            raise CalibrationError(
                f"prompt {prompt!r} has {tokens} tokens, the limit is {limit}: shorten it or raise "
                "--text-tokens"
            )
