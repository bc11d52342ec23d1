"""Train the miniature model and print captions of its world: `python -m mini`."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from mini.clips import write_clips
from mini.training.settings import TrainingSettings
from mini.training.train import TrainingRun
from mini.world.scenes import Split, captions_of

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)


@app.callback()
def main() -> None:
    """Set up logging for every command."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="diffusers folder to write")],
    work: Annotated[Path, typer.Option(help="folder for checkpoints; an earlier run continues")],
    settings: Annotated[Path | None, typer.Option(help="JSON like training.json")] = None,
    device: Annotated[str, typer.Option(help="cuda or cpu")] = "cuda",
    until: Annotated[float, typer.Option(help="share of the denoiser's time to reach")] = 1.0,
    vae_only: Annotated[bool, typer.Option(help="stop after the VAE")] = False,
) -> None:
    """Train VAE, then transformer and text encoder."""
    training_settings = TrainingSettings()
    if settings is not None:
        given = json.loads(settings.read_text())
        training_settings = TrainingSettings(
            vae=replace(training_settings.vae, **given.get("vae", {})),
            denoiser=replace(training_settings.denoiser, **given.get("denoiser", {})),
        )
    run = TrainingRun(work, training_settings, device)
    run.train_vae()
    if not vae_only:
        run.train_denoiser(until)
    run.save(out)


@app.command()
def captions(
    split: Annotated[Split, typer.Argument(help="which set the captions come from")],
    count: Annotated[int, typer.Option(min=1)] = 64,
    seed: int = 0,
) -> None:
    """Print different captions of one split, one a line."""
    print("\n".join(captions_of(split, count, seed)))


@app.command()
def clips(
    split: Annotated[Split, typer.Argument(help="which set the captions come from")],
    out: Annotated[Path, typer.Option(help="folder to make")],
    count: Annotated[int, typer.Option(min=1)] = 64,
    seed: int = 0,
) -> None:
    """Render scenes of one split as lossless MP4s with captions.txt, for `quant encode-clips`."""
    if out.exists():
        typer.echo(f"error: {out} exists already: name another folder, or remove it", err=True)
        raise typer.Exit(1)
    write_clips(out, split, count, seed)
    print(f"wrote {out}: {count} clips")
