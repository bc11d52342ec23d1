"""Where the seconds of one job go, w8a8 beside bf16: `make bench` or `python -m benchmarks.job`.

Runs the whole system (Valkey, worker, service) and asks it over HTTP, so the queue and the front
end are in the figures. The modes take turns, after a round that is not counted; the figure is the
median. Prints a table, then the result as one line of JSON, and keeps it in benchmarks/results/.
"""

import json
import os
import re
import statistics
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console

from deploy.local import client
from deploy.local.cli import clear_errors
from deploy.local.session import throwaway_stack
from deploy.local.signals import listen_for_signals
from deploy.local.stack import ROOT, WORKER_CONFIG, Stack

PROMPT = "a small red circle moving right on a black background"
SEED = 7
BASELINE, CANDIDATE = "bf16", "w8a8"
RESULTS = ROOT / "benchmarks" / "results"
_STAGES = ("queue_s", "text_encoder_s", "denoise_s", "vae_s", "mp4_s")

Seconds = dict[str, float]  # stage → seconds


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Jobs of each mode that count.")] = 5,
    config: Annotated[Path, typer.Option(help="The worker's configuration.")] = WORKER_CONFIG,
) -> None:
    """Measure one job in both modes."""
    console = Console(stderr=True)
    with (
        clear_errors(),
        listen_for_signals() as signals,
        throwaway_stack(console, config, signals) as stack,
        client.connect(stack.config.service_url) as service,
    ):
        model = service.get("/models").json()["models"][0]
        measured: dict[str, list[Seconds]] = {BASELINE: [], CANDIDATE: []}
        for number in range(rounds + 1):
            for mode, seconds in measured.items():
                job = _run(stack, service, mode)
                if number:
                    seconds.append(_seconds(job))
                total_s = job["timings"]["total_s"]
                console.print(f"round {number} of {rounds}, {mode}: {total_s:.2f} s")
    result = _result(model, job["request"], measured)
    _print_table(result)
    _keep(result)
    print(json.dumps(result))


def _run(stack: Stack, service: httpx.Client, mode: str) -> client.Job:
    order = client.Order(PROMPT, mode, SEED)
    return client.follow(service, client.send(service, order), lambda _: stack.check())


def _seconds(job: client.Job) -> Seconds:
    """Each stage, what lies between the stages, and the whole from creation to end."""
    times = {name: float(job["timings"][name]) for name in _STAGES}
    created, finished = (
        datetime.fromisoformat(job[f"{what}_at"]) for what in ("created", "finished")
    )
    whole = (finished - created).total_seconds()
    return times | {"rest_s": whole - sum(times.values()), "whole_s": whole}


def _result(
    model: dict[str, Any], request: dict[str, Any], measured: dict[str, list[Seconds]]
) -> dict[str, Any]:
    settings = {name: request[name] for name in request if name not in ("mode", "negative_prompt")}
    cores = len(os.sched_getaffinity(0))
    settings |= {"rounds": len(measured[BASELINE]), "statistic": "median", "cores": cores}
    medians = {
        mode: {stage: statistics.median(s[stage] for s in seconds) for stage in seconds[0]}
        for mode, seconds in measured.items()
    }
    rows = [
        {
            "what": f"{stage.removesuffix('_s')}, {CANDIDATE} beside {BASELINE}",
            "value": round(value, 4),
            "unit": "s",
            "baseline": round(medians[BASELINE][stage], 4),
            "ratio": round(value / medians[BASELINE][stage], 3),
        }
        for stage, value in medians[CANDIDATE].items()
    ]
    return {
        "benchmark": "job",
        "date": datetime.now(UTC).date().isoformat(),
        "commit": _commit(),
        "device": model["workers"][0]["device"],
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers", "rq")},
        "settings": settings,
        "rows": rows,
    }


def _commit() -> str:
    """What was measured; an unpacked archive has no commit."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def _keep(result: dict[str, Any]) -> None:
    RESULTS.mkdir(exist_ok=True)
    device = re.sub(r"[^a-z0-9]+", "-", result["device"].lower()).strip("-")
    path = RESULTS / f"{result['date']}-{device}-job.json"
    path.write_text(json.dumps(result, indent=2) + "\n")


def _print_table(result: dict[str, Any]) -> None:
    print(f"{'stage':<14}{BASELINE + ' [s]':>12}{CANDIDATE + ' [s]':>12}{'ratio':>8}")
    for row in result["rows"]:
        stage = row["what"].split(",")[0]
        print(f"{stage:<14}{row['baseline']:>12.3f}{row['value']:>12.3f}{row['ratio']:>8.2f}")


if __name__ == "__main__":
    typer.run(main)
