"""Define `python -m quant qat`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer

from quant.console import errors_as_sentences, resumable
from quant.errors import StudyError
from quant.recipe.recipe import DEFAULT_RECIPE, QuantRecipe
from quant.studies.commands.options import Model, Out, load_transformer, study_device
from quant.studies.methods.calibration import calibrate
from quant.studies.methods.registry import METHODS
from quant.studies.output.study_folder import StudyFolder
from quant.studies.points import open_points
from quant.studies.progress import study_progress
from quant.studies.protection.ablate import HeldOut
from quant.studies.protection.analyze import Subject
from quant.studies.qat.clips import open_clips
from quant.studies.qat.cost import Cost
from quant.studies.qat.grid import CONTROL, Grid, grid_of, parse_list, read_grid
from quant.studies.qat.measure import MEASURED_TOGETHER
from quant.studies.qat.outcomes import Outcome
from quant.studies.qat.qat_report import report
from quant.studies.qat.session import Session, measured_run
from quant.studies.qat.setup import (
    Material,
    Options,
    build,
    check_memory,
    flow_shift,
    protected_blocks,
    training_points,
)
from quant.studies.qat.student import check_adapters
from quant.weights.fingerprint import model_fingerprint

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_DEFAULTS = {"learning_rates": "1e-5", "steps": "50,200", "batches": "8", "seeds": "0"}


def qat_command(  # noqa: PLR0913, PLR0917 (typer derives the command line from it)
    model: Model,
    points: Annotated[Path, typer.Option(help="Folder of `record`: where errors are measured.")],
    training: Annotated[
        Path, typer.Option(help="Folder of `record`, of other prompts: trained on, and calibrated.")
    ],
    out: Out,
    methods: Annotated[
        str | None, typer.Option(help="Names with commas, as compare-methods has them.")
    ] = None,
    learning_rates: Annotated[str | None, typer.Option(help="With commas; 1e-5.")] = None,
    steps: Annotated[str | None, typer.Option(help="At how many steps to measure; 50,200.")] = None,
    batches: Annotated[str | None, typer.Option(help="Samples of a step; 8.")] = None,
    data: Annotated[
        str | None, typer.Option(help="How many prompts, or clips, to train on; all.")
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="Of the order and the noise; 0.")] = None,
    grid: Annotated[
        Path | None, typer.Option(help="TOML file of all these, instead of them.")
    ] = None,
    loss: Annotated[
        Literal["teacher", "flow"],
        typer.Option(help="The original's velocity on TRAINING, or flow matching on CLIPS."),
    ] = "teacher",
    clips: Annotated[
        Path | None, typer.Option(help="Folder of `encode-clips`, for flow matching.")
    ] = None,
    held_out_clips: Annotated[
        Path | None, typer.Option(help="The same of other captions: where its loss is measured.")
    ] = None,
    recipe: Annotated[str, typer.Option(help="Which linears are quantized.")] = DEFAULT_RECIPE,
    protect: Annotated[
        str, typer.Option(help="Blocks that are not: paper, none, or numbers with commas.")
    ] = "paper",
    adapter: Annotated[
        Literal["none", "lora"], typer.Option(help="Train all weights, or adapters only.")
    ] = "none",
    rank: Annotated[int, typer.Option(min=1, max=1024, help="Of the adapters.")] = 16,
    dtype: Annotated[
        Literal["float32", "bfloat16"], typer.Option(help="Of products in training.")
    ] = "float32",
    training_points_per_prompt: Annotated[
        int, typer.Option(min=1, help="Points of each prompt of TRAINING.")
    ] = 8,
    points_per_prompt: Annotated[int, typer.Option(min=1, help="Points of each prompt.")] = 2,
    checkpoint_s: Annotated[
        float, typer.Option(min=0, help="Seconds between files to go on from.")
    ] = 60,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Save memory, lose time.")
    ] = False,
    graphs: Annotated[
        bool, typer.Option("--graphs/--no-graphs", help="Replay steps as CUDA graphs.")
    ] = True,
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Where to run.")] = "cpu",
) -> None:
    """Fine-tune MODEL through its rounding, and measure where that beats rounding alone.

    Every combination of the options is trained, beside a control in BF16, and measured on POINTS
    against the original in float32. With one combination, OUT/model is the trained pipeline; if
    that diverges there is none, and the command ends with 1. After Ctrl-C or a fault the same
    command goes on.
    """
    with errors_as_sentences():
        base = QuantRecipe.load(recipe)
        given = {
            "methods": methods,
            "learning_rates": learning_rates,
            "batches": batches,
            "data": data,
            "seeds": seeds,
            "steps": steps,
        }
        _check_clips(loss, clips, held_out_clips)
        if adapter == "lora":
            check_adapters()
        fingerprint = model_fingerprint(model)
        seen = open_points(training)
        material = Material(
            HeldOut(seen, training_points_per_prompt),
            HeldOut(open_points(points), points_per_prompt),
            None if clips is None else open_clips(clips),
            None if held_out_clips is None else open_clips(held_out_clips),
            flow_shift(seen, model),
        )
        available = len(seen.info.prompts) if material.clips is None else len(material.clips)
        plan = _plan(grid, given, available)
        material.check(fingerprint, plan)
        transformer = load_transformer(model)
        options = Options(
            protected_blocks(protect, len(transformer.blocks)),
            rank if adapter == "lora" else None,
            _DTYPES[dtype],
            gradient_checkpointing,
            graphs,
        )
        where, keep = study_device(device, transformer, training_points(material))
        if device == "cuda":  # float32 means float32, in convolutions as well
            torch.backends.cudnn.allow_tf32 = False
        subject = Subject.of(transformer, base, where, keep=keep)
        needed = check_memory(subject, options)
        folder = StudyFolder.open(
            out,
            "qat",
            {
                "model": fingerprint,
                "recipe": base.fingerprint,
                "grid": json.dumps(asdict(plan), sort_keys=True),
                "loss": loss,
                **material.identity(),
                **options.identity(),
                **({"kept linears": ",".join(base.kept_linears)} if base.kept_linears else {}),
                "device": device,
            },
        )
        cost = Cost(plan, material.measured, subject.exact.blocks)
        single = plan.runs[0] if len(plan.runs) == 1 else None
        seen_points = training_points(material)
        of_each = 2 if loss == "teacher" else 1  # statistics, and the velocity to be learned
        before = cost.blocks * (of_each * len(seen_points) + material.held_out.count)
        with resumable(), study_progress(_words(cost, before, needed), cost.total + before) as bar:
            calibration = calibrate(
                subject, seen_points, [METHODS[CONTROL]], MEASURED_TOGETHER, folder, bar
            )
            built = build(subject, material, calibration, plan, options, bar)
            student, trainer, ruler, owners = built
            session = Session(student, trainer, ruler, cost, folder, model, single, checkpoint_s)
            session.run(bar)
        folder.finish(*report(Outcome(folder, plan, owners, loss, subject.recipe_words)))
        typer.echo(f"wrote {out}: see {out / 'index.html'}")
        if single is not None:
            if measured_run(folder, single, plan.steps[-1]) is None:
                raise StudyError(
                    f"the training diverged, so there is no trained pipeline in {out}: train anew "
                    f"in another folder, with a --learning-rates below {single.learning_rate:g}"
                )
            typer.echo(f"the trained pipeline is {out / 'model'}: calibrate it to serve it")


def _check_clips(loss: str, clips: Path | None, held_out_clips: Path | None) -> None:
    given = [each is not None for each in (clips, held_out_clips)]
    if loss == "flow" and not all(given):
        raise StudyError(
            "--loss flow needs --clips and --held-out-clips: make both with "
            "`python -m quant encode-clips`"
        )
    if loss == "teacher" and any(given):
        raise StudyError("clips are for --loss flow: add it, or leave them out")


def _plan(grid: Path | None, given: dict[str, str | None], available: int) -> Grid:
    """Return the runs that the options, or a file, ask for.

    Args:
        available: how many prompts, or clips, there are to train on.
    """
    named = [name for name, text in given.items() if text is not None]
    if grid is not None:
        if named:
            option = named[0].replace("_", "-")
            raise StudyError(f"give --grid, or options such as --{option}, not both")
        return read_grid(grid)
    if given["methods"] is None:
        raise StudyError("give --methods, such as hif8,hif4, or --grid")
    texts = {**_DEFAULTS, "data": str(available), **{name: given[name] for name in named}}
    kinds: dict[str, type[int | float | str]] = {"methods": str, "learning_rates": float}
    values = {
        name: parse_list(str(text), kinds.get(name, int), f"--{name.replace('_', '-')}")
        for name, text in texts.items()
    }
    return grid_of(values, values.pop("steps"))


def _words(cost: Cost, before: int, needed: int) -> str:
    """Say what the study takes."""
    plan = cost.grid
    return (
        f"{cost.total + before:,} passes of one block: {len(plan.runs)} trainings and "
        f"{len(plan.controls)} controls of {plan.steps[-1]} steps, {cost.measured} held-out "
        f"samples; weights and optimizer take at least {needed / 2**30:.2f} GiB"
    )
