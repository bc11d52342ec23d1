"""Compute how long jobs wait: `python -m benchmarks.serving.capacity waits --arrivals ...`.

`waits` simulates the queue for numbers of cards, `cards` looks for the fewest cards that keep waits
below a bound, and `check` compares the simulation with a real service of three workers, whose
engine sleeps. What arrives is given as `RATE:SECONDS` or `RATE:MODE:SIZE[:STEPS]`, with RATE in
jobs an hour, or as recorded jobs.

    python -m benchmarks.serving.capacity waits --arrivals 40:w8a8-fp8:832x480 --cards 2,3,4
    python -m benchmarks.serving.capacity waits --arrivals 1:173 --utilization 0.7,0.9
    python -m benchmarks.serving.capacity cards --arrivals 40:173 --arrivals 5:686 --wait-s 60

Each prints a table; `--save` also writes benchmarks/results/, as `check` always does.
"""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from benchmarks import report
from benchmarks.report import Row
from benchmarks.serving.capacity.check import run_check
from benchmarks.serving.capacity.queue_model import Fleet, simulate
from benchmarks.serving.capacity.waits import Waits, expected_waits, percentile
from benchmarks.serving.capacity.workload import (
    Kind,
    parse_kind,
    recorded,
    scaled,
    utilization,
)

CARDS = "1,2,3,4,8,16,32,64,128,256,512,1000"
PERCENTS = (50, 90, 99)

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)

Arrivals = Annotated[
    list[str], typer.Option(help="RATE:SECONDS or RATE:MODE:SIZE[:STEPS], with :priority or not.")
]
Between = Annotated[float, typer.Option(help="Seconds of a worker between two jobs.")]
Losses = Annotated[float, typer.Option(help="How often a worker is lost, a day.")]
Restart = Annotated[float, typer.Option(help="Seconds until a lost worker is live again.")]
Save = Annotated[bool, typer.Option("--save", help="Write benchmarks/results/, too.")]


@app.command()
def waits(  # noqa: PLR0913, PLR0917 - each is an option of the command
    arrivals: Arrivals = [],  # noqa: B006 - typer's way to take an option many times
    jobs_of: Annotated[
        Path | None, typer.Option("--recorded", help="Answers of GET /jobs, one a line, instead.")
    ] = None,
    cards: Annotated[str, typer.Option(help="Numbers of cards.")] = CARDS,
    loads: Annotated[
        str,
        typer.Option(
            "--utilization", help="Shares of the cards' time; rates are scaled to ask for them."
        ),
    ] = "",
    between_s: Between = 0.05,
    losses_per_day: Losses = 0.0,
    restart_s: Restart = 60.0,
    save: Save = False,
) -> None:
    """Print percentiles of the waits for each number of cards."""
    kinds = _kinds(arrivals, jobs_of)
    rows: list[Row] = []
    for number in map(int, _numbers(cards)):
        fleet = Fleet(number, between_s, losses_per_day / 24, restart_s)
        if jobs_of is not None:
            rows += report.log_rows(_recorded_rows(jobs_of, fleet))
            continue
        shares = _numbers(loads) or [utilization(kinds, number, between_s)]
        for share in shares:
            mix = scaled(kinds, number, share, between_s)
            rows += report.log_rows(rows_of(mix, expected_waits(mix, fleet)))
    settings: dict[str, object] = {
        "arrivals": arrivals,
        "utilization": loads,
        "between_s": between_s,
        "losses_per_day": losses_per_day,
        "restart_s": restart_s,
    }
    _show(rows, "capacity", settings, save)


@app.command()
def cards(
    arrivals: Arrivals,
    wait_s: Annotated[float, typer.Option(help="The longest wait.")] = 60.0,
    percent: Annotated[int, typer.Option(help="Of how many percent of the jobs.")] = 90,
    between_s: Between = 0.05,
    losses_per_day: Losses = 0.0,
    restart_s: Restart = 60.0,
) -> None:
    """Print the fewest cards that keep waits below a bound."""
    kinds = _kinds(arrivals, None)
    number = int(utilization(kinds, 1, between_s)) + 1
    while True:
        fleet = Fleet(number, between_s, losses_per_day / 24, restart_s)
        found = expected_waits(kinds, fleet, percents=(percent,))
        if found.percentiles is not None and found.percentiles[percent].value <= wait_s:
            break
        number += 1
    _show(rows_of(kinds, found), "capacity", {}, save=False)


@app.command()
def check(
    jobs: Annotated[int, typer.Option(min=50, help="Jobs of the load.")] = 300,
    load: Annotated[float, typer.Option(help="Share of the workers' time.")] = 0.8,
    step_s: Annotated[float, typer.Option(help="Seconds of a step.")] = 0.25,
    seed: Annotated[int, typer.Option(help="Of the arrivals.")] = 1,
) -> None:
    """Compare the simulation with three real workers of a real service."""
    settings: dict[str, object] = {
        "jobs": jobs,
        "utilization": load,
        "step_s": step_s,
        "seed": seed,
        "workers": 3,
    }
    rows = report.log_rows(run_check(jobs, load, step_s, seed))
    _show(rows, "capacity-check", settings, save=True, device="cpu")


def rows_of(kinds: list[Kind], found: Waits) -> list[Row]:
    """Return the rows of one number of cards."""
    per_hour = sum(kind.per_hour for kind in kinds)
    name = f"{found.cards} cards, {per_hour:.1f} jobs an hour"
    rows = [Row(f"{name}: utilization", round(found.utilization, 4), "1")]
    if found.percentiles is None:
        return rows  # the queue only grows
    for percent, each in found.percentiles.items():
        value, low, high = (round(number, 2) for number in (each.value, each.low, each.high))
        rows.append(Row(f"{name}: wait, p{percent}", value, "s", low=low, high=high))
    if found.failed:
        rows.append(Row(f"{name}: jobs that lose two workers", found.failed, "1"))
    return rows


def _recorded_rows(path: Path, fleet: Fleet) -> list[Row]:
    run = simulate(recorded(path), fleet)
    name = f"{fleet.cards} cards, {len(run.waits_s)} recorded jobs"
    rows = [Row(f"{name}: utilization", round(run.busy_s / fleet.cards / run.span_s, 4), "1")]
    rows += [
        Row(f"{name}: wait, p{percent}", round(percentile(run.waits_s, percent), 2), "s")
        for percent in PERCENTS
    ]
    return rows


def _kinds(arrivals: list[str], jobs_of: Path | None) -> list[Kind]:
    if bool(arrivals) == (jobs_of is not None):
        raise typer.BadParameter("give either --arrivals, once or more, or --recorded")
    try:
        return [parse_kind(text) for text in arrivals]
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def _numbers(text: str) -> list[float]:
    try:
        found = [float(each) for each in text.split(",") if each]
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not a list of numbers: {error}") from error
    if any(each <= 0 for each in found):
        raise typer.BadParameter(f"{text!r}: every number has to be above 0")
    return found


def _show(
    rows: list[Row],
    name: str,
    settings: dict[str, object],
    save: bool,
    device: str = "simulated",
) -> None:
    report.print_table(rows)
    if save:
        document = report.result(name, device, settings, rows)
        print(json.dumps(document))
        print(report.save(document), file=sys.stderr)


if __name__ == "__main__":
    app()
