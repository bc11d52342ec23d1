"""Define `python -m quant figures`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quant.console import errors_as_sentences
from quant.studies.commands.options import Out
from quant.studies.evaluation.paper_figures import Studies, folders_of, report
from quant.studies.output.study_folder import StudyFolder


def figures_command(
    out: Out,
    analysis: Annotated[Path | None, typer.Option(help="Folder of `analyze`.")] = None,
    evaluation: Annotated[Path | None, typer.Option(help="Folder of `evaluate`.")] = None,
    ablation: Annotated[Path | None, typer.Option(help="Folder of `ablate`.")] = None,
) -> None:
    """Put the paper's figures 1b to 5 of a model on one page, with what its claims look like here.

    It reads the folders of finished studies, and takes a second.
    """
    with errors_as_sentences():
        given = folders_of((("analyze", analysis), ("evaluate", evaluation), ("ablate", ablation)))
        studies = Studies.open(given)
        made = report(studies)
        folders = {name: str(path.resolve()) for name, path in given.items()}
        folder = StudyFolder.open(out, "figures", {"model": studies.model, **folders})
        folder.finish(*made)
    typer.echo(f"wrote {out}: {len(made[2])} figures, see {out / 'index.html'}")
