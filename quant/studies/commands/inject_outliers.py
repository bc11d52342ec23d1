"""Define `python -m quant inject-outliers`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import torch
import typer

from quant.console import errors_as_sentences
from quant.errors import StudyError
from quant.studies.commands.options import Model, load_transformer
from quant.studies.methods.injection import (
    LARGEST_DIFFERENCE,
    Outliers,
    blocks_of,
    difference,
    inject,
    velocity_of,
)
from quant.studies.output.pipeline_folder import write_with_transformer
from quant.weights.fingerprint import model_fingerprint
from quant.weights.new_folder import check_new_folder


def inject_outliers_command(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder to make, a pipeline like MODEL.")],
    blocks: Annotated[
        Literal["ends", "middle"], typer.Option(help="The paper's blocks, or as many between.")
    ] = "ends",
    factor: Annotated[float, typer.Option(help="A power of two from 2 to 1024.")] = 64,
    channels: Annotated[int, typer.Option(help="Channels in each of a block's places.")] = 2,
    seed: Annotated[int, typer.Option(help="Which channels.")] = 0,
) -> None:
    """Give some blocks of MODEL channels with outliers, without changing what it computes.

    The new pipeline is a subject for `compare-methods`. Its velocity on random latents is compared
    with MODEL's in float32 and in BF16 before anything is written.
    """
    with errors_as_sentences():
        check_new_folder(out)
        transformer = load_transformer(model)
        dtypes: tuple[torch.dtype | None, ...] = (torch.float32, None)
        before = [velocity_of(transformer, dtype) for dtype in dtypes]
        chosen = blocks_of(blocks, len(transformer.blocks))
        count = inject(transformer, Outliers(chosen, channels, factor, seed))
        after = [velocity_of(transformer, dtype) for dtype in dtypes]
        exact, service = (difference(a, b) for a, b in zip(after, before, strict=True))
        if not exact <= LARGEST_DIFFERENCE:
            raise StudyError(
                f"the velocity would change by {exact:.2g} of its largest value, more than "
                f"{LARGEST_DIFFERENCE:g}: take a smaller factor than {factor:g}"
            )
        write_with_transformer(model, transformer, out)
        fingerprint = model_fingerprint(out)
    typer.echo(
        f"wrote {out}: {count} channels of blocks {', '.join(map(str, chosen))} are {factor:g} "
        f"times as large; the velocity differs by {exact:.2g} of its largest value in float32 "
        f"(bound {LARGEST_DIFFERENCE:g}), {service:.2g} in the model's dtype"
    )
    typer.echo(f"fingerprint {fingerprint}")
