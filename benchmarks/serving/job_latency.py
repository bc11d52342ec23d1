"""Measure the seconds of each stage of a job in two modes, by default in w8a8 and in bf16.

`make bench` or `python -m benchmarks.serving.job_latency [--baseline fast --candidate fast-w8a8]`

It runs the whole system (Valkey, worker, service) and sends jobs over HTTP, so the figures include
the queue and the front end. The modes take turns, after a warm-up round; each figure is a median.
Each job has its own prompt, because a worker caches embeddings.

It prints a table, then the result as one line of JSON, and saves it in benchmarks/results/.
"""

import json
import os
import statistics
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console

from benchmarks import report
from deploy.local import client
from deploy.local.cli import report_errors
from deploy.local.session import throwaway_stack
from deploy.local.signals import handle_signals
from deploy.local.stack import WORKER_CONFIG, Stack

PROMPT = "a small red circle moving right on a black background"
SEED = 7
_STAGES = ("queue_s", "text_encoder_s", "denoise_s", "vae_s", "mp4_s")

Seconds = dict[str, float]  # stage → seconds


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Jobs of each mode that count.")] = 5,
    config: Annotated[Path, typer.Option(help="The worker's configuration.")] = WORKER_CONFIG,
    baseline: Annotated[str, typer.Option(help="The mode to measure beside.")] = "bf16",
    candidate: Annotated[str, typer.Option(help="The mode to measure.")] = "w8a8",
) -> None:
    """Measure one job in both modes, with the steps and the guidance of each."""
    console = Console(stderr=True)
    with (
        report_errors(),
        handle_signals() as signals,
        throwaway_stack(console, config, signals) as stack,
        client.connect(stack.config.service_url) as service,
    ):
        model = service.get("/models").json()["models"][0]
        measured: dict[str, list[Seconds]] = {baseline: [], candidate: []}
        for number in range(rounds + 1):
            for mode, seconds in measured.items():
                job = _run(stack, service, mode, f"{PROMPT}, take {number} for {mode}")
                if number:
                    seconds.append(_seconds(job))
                total_s = job["timings"]["total_s"]
                console.print(f"round {number} of {rounds}, {mode}: {total_s:.2f} s")
    rows = _rows(measured, baseline, candidate)
    device = model["workers"][0]["device"]
    document = report.result("job", device, _settings(job["request"], rounds), rows)
    report.print_table(rows)
    report.save(document)
    print(json.dumps(document))


def _run(stack: Stack, service: httpx.Client, mode: str, prompt: str) -> client.Job:
    request = client.VideoRequest(prompt, mode, SEED)
    return client.follow(service, client.send(service, request), lambda _: stack.check())


def _seconds(job: client.Job) -> Seconds:
    """Return the seconds of each stage, of the rest, and of the whole from creation to end."""
    times = {name: float(job["timings"][name]) for name in _STAGES}
    created, finished = (
        datetime.fromisoformat(job[f"{what}_at"]) for what in ("created", "finished")
    )
    whole = (finished - created).total_seconds()
    return times | {"rest_s": whole - sum(times.values()), "whole_s": whole}


def _rows(measured: dict[str, list[Seconds]], baseline: str, candidate: str) -> list[report.Row]:
    medians = {
        mode: {stage: statistics.median(s[stage] for s in seconds) for stage in seconds[0]}
        for mode, seconds in measured.items()
    }
    return [
        report.Row(
            what=f"{stage.removesuffix('_s')}, {candidate} beside {baseline}",
            value=round(value, 4),
            unit="s",
            baseline=round(medians[baseline][stage], 4),
        )
        for stage, value in medians[candidate].items()
    ]


def _settings(request: dict[str, Any], rounds: int) -> dict[str, Any]:
    values = {name: request[name] for name in request if name not in ("mode", "negative_prompt")}
    cores = len(os.sched_getaffinity(0))
    own = {"prompt": PROMPT, "rounds": rounds, "statistic": "median", "cores": cores}
    return values | own


if __name__ == "__main__":
    typer.run(main)
