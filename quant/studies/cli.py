"""Add the studies' commands to the toolkit's."""

from __future__ import annotations

import typer

from quant.studies.commands.ablate import ablate_command
from quant.studies.commands.analyze import analyze_command
from quant.studies.commands.compare_methods import compare_methods_command
from quant.studies.commands.encode_clips import encode_clips_command
from quant.studies.commands.evaluate import evaluate_command
from quant.studies.commands.figures import figures_command
from quant.studies.commands.inject_outliers import inject_outliers_command
from quant.studies.commands.qat import qat_command
from quant.studies.commands.record import record_command


def register(app: typer.Typer) -> None:
    """Add the studies' commands to `app`."""
    app.command("record")(record_command)
    app.command("analyze")(analyze_command)
    app.command("ablate")(ablate_command)
    app.command("evaluate")(evaluate_command)
    app.command("figures")(figures_command)
    app.command("compare-methods")(compare_methods_command)
    app.command("encode-clips")(encode_clips_command)
    app.command("qat")(qat_command)
    app.command("inject-outliers")(inject_outliers_command)
