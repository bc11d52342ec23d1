"""Run `python -m worker doctor`: parse arguments, make the checks in order, print the report."""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from worker.process.ready_file import why_not_ready

_FILES_FIT = "The files fit. Device, Redis and artifact store were not looked at."


def doctor(
    config: Annotated[
        Path | None, typer.Option(help="The worker's TOML file; overrides WORKER_CONFIG.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    files: Annotated[
        bool,
        typer.Option(
            "--files",
            help="Only check configuration, model folder, scales and packed checkpoints: for what "
            "runs before a worker. It takes no device, and asks neither Redis nor the store.",
        ),
    ] = False,
    ready: Annotated[
        bool,
        typer.Option(
            "--ready",
            help="Only say whether the worker on this machine serves now: for probes. It reads "
            "WORKER_READY_FILE, or else the worker's scratch folder in TMPDIR.",
        ),
    ] = False,
) -> None:
    """Check all that a worker needs, and print a report that can be sent back.

    It looks at versions, driver, CANN, ffmpeg, Redis, artifact store, configuration, model folder,
    scales, device and memory. Then it tries the kernels with timings, loads the model, and runs one
    tiny job in each mode and an exchange between cards. Do not run it beside a worker on the same
    card, which would have no memory left. The report holds no passwords, keys or prompts. The exit
    status is 0 if a worker can serve here, else 1, with a remedy under each failed line.
    """
    if ready:
        problem = why_not_ready()
        typer.echo("ready" if problem is None else f"not ready: {problem}", err=problem is not None)
        raise typer.Exit(int(problem is not None))
    # Only here, because they import torch.
    from worker.doctor.examination import examine, examine_files  # noqa: PLC0415
    from worker.doctor.report import Report  # noqa: PLC0415

    report = Report((lambda _line: None) if json else typer.echo)
    with ExitStack() as opened:
        if files:
            examine_files(report, config, opened)
        else:
            examine(report, config, opened)
    summary = report.summary(_FILES_FIT) if files else report.summary()
    typer.echo(report.to_json() if json else summary)
    if report.device_lost:
        sys.stdout.flush()
        os._exit(1)  # a lost device may block a normal exit
    raise typer.Exit(int(not report.is_sound))
