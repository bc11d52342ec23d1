"""Define `python -m quant ablate`."""

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
    Points,
    load_transformer,
    study_device,
)
from quant.studies.output.study_folder import StudyFolder
from quant.studies.points import open_points
from quant.studies.progress import study_progress
from quant.studies.protection.ablate import (
    HeldOut,
    all_protections,
    measure_protections,
    report,
    that_differ,
)
from quant.studies.protection.analyze import Subject, quantizer_of
from quant.studies.protection.proposal import read_proposal
from quant.transformer.lora.merge import read_loras
from quant.transformer.lora.source import Loras, LoraSource
from quant.weights.fingerprint import model_fingerprint
from quant.weights.model_folder import check_model_kind


def ablate_command(  # noqa: PLR0913, PLR0917 (typer derives the command line from it)
    model: Model,
    points: Points,
    analysis: Annotated[Path, typer.Option(help="Folder of `analyze`, on other prompts.")],
    out: Out,
    recipe: Annotated[str, typer.Option(help="What the analysis measured.")] = DEFAULT_RECIPE,
    random_sets: Annotated[
        int,
        typer.Option(
            min=0, help="Random sets of the paper's number of blocks, and the proposal's."
        ),
    ] = 50,
    points_per_prompt: Annotated[int, typer.Option(min=1, help="Points of each prompt.")] = 2,
    seed: Annotated[int, typer.Option(help="Of the random sets.")] = 0,
    batch: Batch = 8,
    lora: Loras = [],  # noqa: B006
    device: Device = "cpu",
) -> None:
    """Measure sets of protected blocks on POINTS of prompts that the analysis has not seen.

    The sets are the paper's four, the analysis' proposal, the middle, the paper's without each of
    its blocks, and random ones. Scales are those of the analysis' prompts.
    """
    with errors_as_sentences():
        check_model_kind(model)
        base = QuantRecipe.load(recipe)
        recorded = open_points(points)
        loras = read_loras(model, map(LoraSource.parse, lora))
        fingerprint = loras.fingerprint(model_fingerprint(model))
        recorded.check_model(fingerprint)
        proposal = read_proposal(analysis, fingerprint, recorded)
        transformer = load_transformer(model, loras)
        proposal.check_recipe(base, len(transformer.blocks))
        where, keep = study_device(device, transformer)
        subject = Subject.of(transformer, base, where, keep=keep)
        blocks = subject.exact.blocks
        protections = that_differ(
            all_protections(blocks, proposal.blocks, random_sets, seed), subject
        )
        folder = StudyFolder.open(
            out,
            "ablate",
            {
                "model": fingerprint,
                "recipe": proposal.recipe,
                "analysis": proposal.sha256,
                "set of points": json.dumps(asdict(recorded.info), sort_keys=True),
                "set of protections": json.dumps(
                    {name: asdict(each) for name, each in protections.items()}
                ),
                "number of points per prompt": str(points_per_prompt),
                "number of points in a batch": str(batch),
                "device": device,
            },
        )
        held_out = HeldOut(recorded, points_per_prompt, batch)
        cost = held_out.count * blocks * (len(protections) + 1)
        words = f"{cost:,} passes of one block: {held_out.count} points, {len(protections)} sets"
        quantizer = quantizer_of(subject, proposal.folder, len(proposal.prompts))
        with resumable(), study_progress(words, cost) as progress:
            measure_protections(subject, held_out, quantizer, protections, folder, progress)
        folder.finish(*report(folder, recorded.info.prompts, protections, subject.recipe_words))
    typer.echo(f"wrote {out}: see {out / 'index.html'}")
