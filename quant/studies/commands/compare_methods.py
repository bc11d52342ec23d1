"""Define `python -m quant compare-methods`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from quant.console import errors_as_sentences, resumable
from quant.recipe.recipe import DEFAULT_RECIPE, QuantRecipe
from quant.studies.commands.options import (
    Batch,
    Device,
    Model,
    Out,
    load_transformer,
    study_device,
)
from quant.studies.methods.calibration import calibrate
from quant.studies.methods.compare import Calibrated, comparison_cost, measure_methods
from quant.studies.methods.methods_report import NONE, Comparison, report
from quant.studies.methods.registry import chosen_methods
from quant.studies.output.study_folder import StudyFolder
from quant.studies.points import open_points
from quant.studies.progress import study_progress
from quant.studies.protection.ablate import HeldOut
from quant.studies.protection.analyze import Subject
from quant.studies.protection.block_sets import paper_sets
from quant.studies.protection.proposal import read_proposal
from quant.transformer.lora.merge import read_loras
from quant.transformer.lora.source import Loras, LoraSource
from quant.weights.fingerprint import model_fingerprint


def compare_methods_command(  # noqa: PLR0913, PLR0917 (typer derives the command line from it)
    model: Model,
    points: Annotated[Path, typer.Option(help="Folder of `record`: where errors are measured.")],
    calibration: Annotated[Path, typer.Option(help="Folder of `record`, of other prompts.")],
    out: Out,
    methods: Annotated[str, typer.Option(help="Names with commas, or all.")] = "all",
    analysis: Annotated[
        Path | None, typer.Option(help="Folder of `analyze`, whose blocks are protected, too.")
    ] = None,
    recipe: Annotated[str, typer.Option(help="Which linears are quantized.")] = DEFAULT_RECIPE,
    points_per_prompt: Annotated[int, typer.Option(min=1, help="Points of each prompt.")] = 2,
    calibration_points_per_prompt: Annotated[
        int, typer.Option(min=1, help="Points of each prompt of CALIBRATION.")
    ] = 4,
    batch: Batch = 8,
    lora: Loras = [],  # noqa: B006
    device: Device = "cpu",
) -> None:
    """Measure what ways to quantize do to MODEL's velocity, on POINTS, against float32.

    Each method runs with no block protected, with the paper's, and with those that an analysis
    proposes. Static scales, and weights rounded by GPTQ, are made on the points of CALIBRATION.
    After Ctrl-C or a fault the same command goes on.
    """
    with errors_as_sentences():
        base = QuantRecipe.load(recipe)
        chosen = chosen_methods(methods)
        loras = read_loras(model, map(LoraSource.parse, lora))
        fingerprint = loras.fingerprint(model_fingerprint(model))
        recorded, seen = open_points(points), open_points(calibration)
        for each in (recorded, seen):
            each.check_model(fingerprint)
        recorded.check_apart(frozenset(seen.info.prompts), f"the calibration {calibration}")
        transformer = load_transformer(model, loras)
        blocks = len(transformer.blocks)
        protections = {NONE: (), "paper": paper_sets(blocks)["both ends"]}
        if analysis is not None:
            protections["proposed"] = read_proposal(analysis, fingerprint, recorded).blocks
        calibrating = HeldOut(seen, calibration_points_per_prompt)
        measured_on = [
            point
            for prompt in range(len(seen.info.prompts))
            for point in calibrating.of_prompt(prompt)
        ]
        where, keep = study_device(device, transformer, measured_on)
        subject = Subject.of(transformer, base, where, keep=keep)
        folder = StudyFolder.open(
            out,
            "compare-methods",
            {
                "model": fingerprint,
                "recipe": base.fingerprint,
                "measured recipe": subject.recipe.fingerprint,
                "set of points": json.dumps(asdict(recorded.info), sort_keys=True),
                "set of calibration points": json.dumps(asdict(seen.info), sort_keys=True),
                "set of methods": ",".join(method.name for method in chosen),
                "set of protections": json.dumps(protections),
                "number of points per prompt": f"{points_per_prompt}",
                "number of calibration points per prompt": f"{calibration_points_per_prompt}",
                "number of points in a batch": f"{batch}",
                "device": device,
            },
        )
        held_out = HeldOut(recorded, points_per_prompt, batch)
        cost = blocks * len(measured_on)
        cost += comparison_cost(blocks, held_out.count, len(chosen), len(protections))
        words = (
            f"{cost:,} passes of one block: {held_out.count} points, {len(chosen)} methods, "
            f"{len(protections)} protections, {len(measured_on)} points to calibrate on"
        )
        with resumable(), study_progress(words, cost) as progress:
            known = calibrate(subject, measured_on, chosen, batch, folder, progress)
            calibrated = Calibrated(subject, known, keep)
            measure_methods(calibrated, held_out, chosen, protections, folder, progress)
        found = Comparison(subject, folder, recorded.info.prompts, chosen, protections)
        folder.finish(*report(found))
    typer.echo(f"wrote {out}: see {out / 'index.html'}")
