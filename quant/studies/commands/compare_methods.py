"""Define `python -m quant compare-methods`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from quant.console import INTERRUPTED, errors_as_sentences
from quant.errors import StudyError
from quant.recipe.recipe import DEFAULT_RECIPE, QuantRecipe
from quant.studies.commands.options import Device, Model, Out, load_transformer, study_device
from quant.studies.methods.calibration import calibrate
from quant.studies.methods.compare import Calibrated, comparison_cost, measure_methods
from quant.studies.methods.methods_report import NONE, Comparison, report
from quant.studies.methods.registry import chosen_methods
from quant.studies.output.study_folder import StudyFolder, read_results
from quant.studies.points import PointsFolder, open_points
from quant.studies.progress import study_progress
from quant.studies.protection.ablate import HeldOut
from quant.studies.protection.analyze import Subject
from quant.studies.protection.block_sets import paper_sets
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
        fingerprint = model_fingerprint(model)
        recorded, seen = open_points(points), open_points(calibration)
        for each in (recorded, seen):
            each.check_model(fingerprint)
        recorded.check_apart(frozenset(seen.info.prompts), f"the calibration {calibration}")
        transformer = load_transformer(model)
        blocks = len(transformer.blocks)
        protections = {NONE: (), "paper": paper_sets(blocks)["both ends"]}
        if analysis is not None:
            protections["proposed"] = _proposed(analysis, fingerprint, recorded)
        where, keep = study_device(device, transformer)
        subject = Subject.of(transformer, base, where, keep=keep)
        folder = StudyFolder.open(
            out,
            "compare-methods",
            {
                "model": fingerprint,
                "recipe": base.fingerprint,
                "set of points": json.dumps(asdict(recorded.info), sort_keys=True),
                "set of calibration points": json.dumps(asdict(seen.info), sort_keys=True),
                "set of methods": ",".join(method.name for method in chosen),
                "set of protections": json.dumps(protections),
                "number of points per prompt": f"{points_per_prompt}",
                "number of calibration points per prompt": f"{calibration_points_per_prompt}",
                "device": device,
            },
        )
        held_out = HeldOut(recorded, points_per_prompt)
        calibrating = HeldOut(seen, calibration_points_per_prompt)
        measured_on = [
            point
            for prompt in range(len(seen.info.prompts))
            for point in calibrating.of_prompt(prompt)
        ]
        available = recorded.info.points // len(recorded.info.prompts)
        count = len(recorded.info.prompts) * min(points_per_prompt, available)
        cost = blocks * len(measured_on)
        cost += comparison_cost(blocks, count, len(chosen), len(protections))
        words = (
            f"{cost:,} passes of one block: {count} points, {len(chosen)} methods, "
            f"{len(protections)} protections, {len(measured_on)} points to calibrate on"
        )
        try:
            with study_progress(words, cost) as progress:
                known = calibrate(subject, measured_on, chosen, folder, progress)
                calibrated = Calibrated(subject, known, keep)
                measure_methods(calibrated, held_out, chosen, protections, folder, progress)
        except KeyboardInterrupt:
            typer.echo("stopped: the same command goes on from here", err=True)
            raise typer.Exit(INTERRUPTED) from None
        found = Comparison(subject, folder, recorded.info.prompts, chosen, protections)
        folder.finish(*report(found))
    typer.echo(f"wrote {out}: see {out / 'index.html'}")


def _proposed(analysis: Path, fingerprint: str, points: PointsFolder) -> tuple[int, ...]:
    """Return the blocks that an analysis of the same model, on other prompts, proposes."""
    found = read_results(analysis, "analyze")
    identity = StudyFolder.finished(analysis, "analyze").identity
    if identity["model"] != fingerprint:
        raise StudyError(f"{analysis} is of another model: analyze this one first")
    prompts = frozenset(json.loads(identity["set of points"])["prompts"])
    points.check_apart(prompts, f"the analysis {analysis}")
    return tuple(found["proposed"])
