"""Define `python -m quant analyze`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated, Any

import typer

from quant.console import errors_as_sentences, resumable
from quant.errors import StudyError
from quant.recipe.recipe import DEFAULT_RECIPE, QuantRecipe
from quant.studies.commands.options import (
    Batch,
    Device,
    Model,
    Out,
    Points,
    load_transformer,
    study_device,
)
from quant.studies.output.study_folder import StudyFolder
from quant.studies.points import open_points
from quant.studies.progress import study_progress
from quant.studies.protection.analysis_report import Analysis, report
from quant.studies.protection.analyze import (
    AnalysisOptions,
    Subject,
    analysis_cost,
    measure_activations,
    measure_additivity,
    measure_sensitivity,
    quantizer_of,
)
from quant.studies.protection.block_sets import paper_sets
from quant.studies.protection.proposal import write_recipe
from quant.transformer.lora.merge import read_loras
from quant.transformer.lora.source import Loras, LoraSource
from quant.weights.fingerprint import model_fingerprint
from quant.weights.model_folder import check_model_kind


def analyze_command(  # noqa: PLR0913, PLR0917 (typer derives the command line from it)
    model: Model,
    points: Points,
    out: Out,
    recipe: Annotated[
        str, typer.Option(help="The format and linears; its protected blocks do not matter.")
    ] = DEFAULT_RECIPE,
    blocks: Annotated[
        int | None, typer.Option(min=0, help="Budget: how many blocks to protect.")
    ] = None,
    error_share: Annotated[
        float | None, typer.Option(help="Budget: the share of the error energy that may stay.")
    ] = None,
    gib: Annotated[
        float | None, typer.Option(min=0, help="Budget: GiB of weights more than all quantized.")
    ] = None,
    points_per_prompt: Annotated[
        int, typer.Option(min=1, help="Points at which blocks are quantized one at a time.")
    ] = 2,
    linear_points: Annotated[
        int,
        typer.Option(min=2, help="Points at which linears and sets of blocks are, one a prompt."),
    ] = 32,
    batch: Batch = 8,
    lora: Loras = [],  # noqa: B006
    device: Device = "cpu",
) -> None:
    """Find the blocks and linears of MODEL that suffer from quantization, and propose a recipe.

    OUT gets results.json, tables, figures, index.html and recipe.toml, with the proposed blocks
    protected. The default budget is as many blocks as the paper protects. After Ctrl-C or a fault
    the same command goes on.
    """
    with errors_as_sentences():
        check_model_kind(model)
        base = QuantRecipe.load(recipe)
        recorded = open_points(points)
        loras = read_loras(model, map(LoraSource.parse, lora))
        fingerprint = loras.fingerprint(model_fingerprint(model))
        recorded.check_model(fingerprint)
        options = AnalysisOptions(points_per_prompt, linear_points, batch)
        transformer = load_transformer(model, loras)
        budget = _budget(transformer, blocks, error_share, gib)
        where, keep = study_device(device, transformer)
        subject = Subject.of(transformer, base, where, keep=keep)
        folder = StudyFolder.open(
            out,
            "analyze",
            {
                "model": fingerprint,
                "recipe": base.fingerprint,
                "measured recipe": subject.recipe.fingerprint,
                "set of points": json.dumps(asdict(recorded.info), sort_keys=True),
                "set of options": json.dumps(asdict(options)),
                "device": device,
            },
        )
        cost = analysis_cost(subject, recorded, options)
        info = recorded.info
        words = (
            f"{cost:,} passes of one block: {info.points} points of {len(info.prompts)} prompts, "
            f"{subject.exact.blocks} blocks"
        )
        with resumable(), study_progress(words, cost) as progress:
            measure_activations(subject, recorded, batch, folder, progress)
            quantizer = quantizer_of(subject, folder, len(info.prompts))
            measure_sensitivity(subject, recorded, quantizer, options, folder, progress)
            measure_additivity(subject, recorded, quantizer, options, folder, progress)
        analysis = Analysis(subject, folder, info.prompts)
        results, tables, figures, page = report(analysis, quantizer, budget)
        write_recipe(out / "recipe.toml", base, subject.exact.blocks, results["proposed"])
        folder.finish(results, tables, figures, page)
    typer.echo(f"wrote {out}: protect blocks {results['proposed']}, see {out / 'index.html'}")


def _budget(
    transformer: Any, blocks: int | None, error_share: float | None, gib: float | None
) -> dict[str, Any]:
    if sum(each is not None for each in (blocks, error_share, gib)) > 1:
        raise StudyError("give one budget: --blocks, --error-share or --gib")
    if error_share is not None:
        return {"error_share": error_share}
    if gib is not None:
        # A protected block keeps two bytes of each weight instead of one.
        size = sum(each.numel() for each in transformer.blocks[0].parameters())
        return {"budget_bytes": int(gib * 2**30), "bytes_each": size}
    count = len(transformer.blocks)
    return {"count": len(paper_sets(count)["both ends"]) if blocks is None else blocks}
