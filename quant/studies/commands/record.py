"""Define `python -m quant record`."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer

from quant.calibration import sampler_options as options
from quant.calibration.progress import CalibrationProgress
from quant.calibration.prompts import PromptSet
from quant.calibration.sampler_options import sampler_of
from quant.calibration.sampling import check_prompt_lengths, load_pipeline, load_tokenizer
from quant.console import errors_as_sentences, resumable
from quant.studies.commands.options import Device, Model
from quant.studies.points import PointsInfo, new_points
from quant.studies.record import record_points, spread_steps
from quant.transformer.lora.merge import read_loras
from quant.transformer.lora.source import Loras, LoraSource
from quant.transformer.pipeline_weights import check_pipeline_weights
from quant.weights.fingerprint import model_fingerprint
from quant.weights.model_folder import check_model_kind


def record_command(  # noqa: PLR0913, PLR0917 (typer derives the command line from it)
    model: Model,
    prompts: Annotated[Path, typer.Option(help="Text file, one prompt per line, UTF-8.")],
    out: Annotated[Path, typer.Option(help="Folder to make, or to go on with.")],
    keep: Annotated[int, typer.Option(min=1, help="How many steps of each prompt to keep.")] = 8,
    batch: Annotated[int, typer.Option(min=1, help="Prompts that run together.")] = 1,
    config: options.Config = None,
    steps: options.Steps = None,
    size: options.Size = None,
    frames: options.Frames = None,
    guidance_scale: options.GuidanceScale = None,
    text_tokens: options.TextTokens = None,
    negative_prompt: options.NegativePrompt = None,
    flow_shift: options.FlowShift = None,
    seed: options.Seed = None,
    lora: Loras = [],  # noqa: B006
    device: Device = "cpu",
) -> None:
    """Run MODEL over PROMPTS in BF16 and keep what its transformer is given at some steps in OUT.

    The studies run on these points. After Ctrl-C or a fault the same command goes on.
    """
    with errors_as_sentences():
        check_model_kind(model)
        loras = read_loras(model, map(LoraSource.parse, lora))
        sampler = sampler_of(
            model,
            config,
            size=size,
            num_frames=frames,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            text_tokens=text_tokens,
            negative_prompt=negative_prompt,
            flow_shift=flow_shift,
            seed=seed,
        )
        prompt_set = PromptSet.read(prompts)
        check_prompt_lengths(load_tokenizer(model), prompt_set.prompts, sampler)
        info = PointsInfo(
            model=loras.fingerprint(model_fingerprint(model)),
            prompts=prompt_set.prompts,
            prompts_sha256=prompt_set.sha256,
            prompts_file=prompt_set.file,
            sampler=sampler,
            steps=spread_steps(keep, sampler.num_inference_steps),
            batch=batch,
            device=device,
        )
        check_pipeline_weights(model)
        folder = new_points(out, info)
        pipe = load_pipeline(model, device)
        loras.merge(pipe.transformer)
        progress = CalibrationProgress(len(prompt_set.prompts))
        with resumable(), closing(progress):
            record_points(pipe, prompt_set, sampler, folder, progress)
    typer.echo(f"wrote {out}: {info.points} points of {len(info.prompts)} prompts")
