"""Train the miniature, distil it, and print captions of its world: `python -m mini`."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import typer

from mini.clips import write_clips
from mini.distillation.progress import Progress
from mini.distillation.report import Judged, write_result
from mini.distillation.run import Distillation
from mini.distillation.settings import DistillError, DistillSettings
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


_DISTILL = DistillSettings()


@app.command()
def distill(  # noqa: PLR0913, PLR0917 (typer derives the command line from it)
    out: Annotated[Path, typer.Option(help="folder to make: the LoRA, its card and figures")],
    work: Annotated[Path, typer.Option(help="folder for checkpoints; an earlier run continues")],
    model: Annotated[Path, typer.Option(help="the miniature")] = Path("models/wan-mini"),
    device: Annotated[Literal["cuda", "cpu"], typer.Option(help="where to run")] = "cuda",
    steps: Annotated[int, typer.Option(min=1, help="of the optimizer")] = _DISTILL.steps,
    batch: Annotated[int, typer.Option(min=1, help="samples of a step")] = _DISTILL.batch,
    rounds: Annotated[
        int, typer.Option(min=1, help="of recording; from the second on the student leads")
    ] = _DISTILL.rounds,
    trajectories: Annotated[
        int, typer.Option(min=1, help="recorded in each round")
    ] = _DISTILL.trajectories,
    teacher_steps: Annotated[
        int, typer.Option(min=1, help="of the teacher in each of the student's steps")
    ] = _DISTILL.teacher_steps,
    student_steps: Annotated[
        int, typer.Option(min=1, max=20, help="that the LoRA is for")
    ] = _DISTILL.student_steps,
    rank: Annotated[int, typer.Option(min=1, help="of the LoRA")] = _DISTILL.rank,
    learning_rate: Annotated[
        float, typer.Option(min=1e-9, help="highest of the run")
    ] = _DISTILL.learning_rate,
    seed: Annotated[int, typer.Option(min=0)] = _DISTILL.seed,
    captions: Annotated[
        Path | None, typer.Option(help="to train on, one a line; else drawn anew")
    ] = None,
    evaluate: Annotated[int, typer.Option(min=1, help="captions for the oracle")] = 300,
) -> None:
    """Train a LoRA for few steps without guidance, and judge it beside 20 guided steps.

    After Ctrl-C or a fault the same command goes on, and gives the same LoRA.
    """
    began = time.monotonic()
    try:
        if out.exists():
            raise DistillError(f"{out} exists already: name another folder, or remove it")
        places = (out.resolve(), work.resolve())
        if any(one.is_relative_to(other) for one, other in (places, places[::-1])):
            raise DistillError(
                f"--out {out} and --work {work} are one folder, or one is in the other: --out is "
                "made at the end, so name two that lie side by side"
            )
        settings = DistillSettings(
            steps=steps,
            batch=batch,
            rounds=rounds,
            trajectories=trajectories,
            teacher_steps=teacher_steps,
            student_steps=student_steps,
            rank=rank,
            learning_rate=learning_rate,
            seed=seed,
        )
        given = None if captions is None else _read_lines(captions)
        run = Distillation(model, work, settings, device, given)
        recording, training = run.passes
        judging = Judged.passes(run, evaluate)
        print(
            f"passes of the transformer with one sample: {recording:,} to record, {training:,} to "
            f"train, {judging:,} to judge {evaluate} captions three times"
        )
        progress = Progress(recording + training + judging)
        run.run(progress)
        judged = Judged(run, evaluate)
        judged.generate(progress)
        write_result(out, run, judged, began)
    except (DistillError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    print(f"wrote {out}")


def _read_lines(file: Path) -> list[str]:
    """Read a text file by lines.

    Raises:
        DistillError: it is not UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DistillError(
            f"{file} is not UTF-8 (byte {error.start} is 0x{error.object[error.start]:02x}): save "
            "it as UTF-8"
        ) from error


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
