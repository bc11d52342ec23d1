"""Define `python -m quant record`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quant.calibration.progress import CalibrationProgress
from quant.calibration.prompts import PromptSet
from quant.calibration.sampler import resolve_sampler
from quant.calibration.sampling import load_pipeline
from quant.console import INTERRUPTED, errors_as_sentences, parse_size
from quant.studies.commands.options import Device, Model
from quant.studies.points import PointsInfo, new_points
from quant.studies.record import record_points, spread_steps
from quant.transformer.pipeline_weights import check_pipeline_weights
from quant.weights.fingerprint import model_fingerprint, read_transformer_config
from quant.weights.model_folder import check_model_kind


def record_command(  # noqa: PLR0913, PLR0917 (typer derives the command line from it)
    model: Model,
    prompts: Annotated[Path, typer.Option(help="Text file, one prompt per line, UTF-8.")],
    out: Annotated[Path, typer.Option(help="Folder to make, or to go on with.")],
    keep: Annotated[int, typer.Option(min=1, help="How many steps of each prompt to keep.")] = 8,
    steps: Annotated[int | None, typer.Option(help="Denoising steps per prompt.")] = None,
    size: Annotated[str | None, typer.Option(help="Width x height, like 832x480.")] = None,
    frames: Annotated[int | None, typer.Option(help="Frames per video, 4k + 1.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="1 turns guidance off.")] = None,
    text_tokens: Annotated[int | None, typer.Option(help="Length prompts are padded to.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the first prompt.")] = None,
    device: Device = "cpu",
) -> None:
    """Run MODEL over PROMPTS in BF16 and keep what its transformer is given at some steps in OUT.

    The studies run on these points. After Ctrl-C or a fault the same command goes on.
    """
    with errors_as_sentences():
        check_model_kind(model)
        overrides = {
            "size": parse_size(size),
            "num_frames": frames,
            "num_inference_steps": steps,
            "guidance_scale": guidance_scale,
            "text_tokens": text_tokens,
            "seed": seed,
        }
        sampler = resolve_sampler(read_transformer_config(model), overrides)
        prompt_set = PromptSet.read(prompts)
        info = PointsInfo(
            model=model_fingerprint(model),
            prompts=prompt_set.prompts,
            prompts_sha256=prompt_set.sha256,
            prompts_file=prompt_set.file,
            sampler=sampler,
            steps=spread_steps(keep, sampler.num_inference_steps),
        )
        check_pipeline_weights(model)
        folder = new_points(out, info)
        pipe = load_pipeline(model, device)
        progress = CalibrationProgress(len(prompt_set.prompts))
        try:
            record_points(pipe, prompt_set, sampler, folder, progress)
        except KeyboardInterrupt:
            typer.echo("stopped: the same command goes on from here", err=True)
            raise typer.Exit(INTERRUPTED) from None
        finally:
            progress.close()
    typer.echo(f"wrote {out}: {info.points} points of {len(info.prompts)} prompts")
