"""How soon a cancelled job stops: `python -m benchmarks.serving.cancel_latency`.

The real worker with the miniature; each job is cancelled at a random moment of one stage. Latency
is from sending DELETE to the event that says `cancelled`, which the worker writes when the device
has stopped. Beside it stands the longest piece of work that cannot be interrupted: a denoising
step, a latent frame, a layer of the text encoder.

Prints a table, then the result as one line of JSON, and keeps it in benchmarks/results/.
"""

import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer

from benchmarks import report
from benchmarks.report import Row
from deploy.local.cluster import Cluster

JOB: dict[str, Any] = {
    "prompt": "a large blue square moving up on a white background",
    "negative_prompt": "blurred",
    "num_frames": 17,
    "num_inference_steps": 8,
}
STAGES = ("text_encoder", "denoise", "vae", "mp4")


def main(
    cancels: Annotated[int, typer.Option(min=1, help="Jobs cancelled in each stage.")] = 30,
    seed: Annotated[int, typer.Option(help="Of the moments.")] = 1,
) -> None:
    """Cancel at random moments."""
    dice = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="wan-cancel-") as folder:
        environment = {"WORKER_THREADS": "2"}
        with (
            Cluster(Path(folder), apis=1, workers=1, environment=environment) as cluster,
            httpx.Client(base_url=cluster.urls[0], timeout=60) as client,
        ):
            whole = _stage_seconds(client)
            latency, late = _cancel_all(client, whole, dice, cancels)
    pieces = {
        "text_encoder": whole["text_encoder"],
        "denoise": whole["denoise"] / JOB["num_inference_steps"],
        "vae": whole["vae"] / (1 + JOB["num_frames"] // 4),
        "mp4": whole["mp4"],
    }
    rows = []
    for stage, seconds in latency.items():
        if not seconds:
            continue
        piece_ms = round(1000 * pieces[stage], 1)
        for what, value in (("median", statistics.median(seconds)), ("worst", max(seconds))):
            name = f"cancel in {stage}, {what} of {len(seconds)} (baseline: one piece of work)"
            rows.append(Row(name, round(1000 * value, 1), "ms", baseline=piece_ms))
    settings = {"cancels": cancels, "seed": seed, "job": JOB, "ended_before_the_cancel": late}
    document = report.result("cancel", "cpu", settings, rows)
    report.print_table(rows)
    report.keep(document)
    print(json.dumps(document))


def _stage_seconds(client: httpx.Client) -> dict[str, float]:
    """The stages of an undisturbed job, after one that is not counted."""
    timings = {}
    for number in range(2):
        job_id = _order(client, f"whole {number}", seed=7)
        for event in _events(client, job_id):
            if event["state"] == "succeeded":
                break
        timings = client.get(f"/jobs/{job_id}").json()["timings"]
    return {stage: timings[f"{stage}_s"] for stage in STAGES}


def _cancel_all(
    client: httpx.Client, whole: dict[str, float], dice: random.Random, cancels: int
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Cancel jobs stage by stage; also counts those that had ended before the DELETE arrived."""
    latency: dict[str, list[float]] = {stage: [] for stage in STAGES}
    late = dict.fromkeys(STAGES, 0)
    for stage in STAGES:
        for number in range(cancels):
            take = f"{stage} {number}"
            seconds = _cancel_one(client, take, stage, dice.uniform(0, whole[stage]))
            if seconds is None:
                late[stage] += 1
            else:
                latency[stage].append(seconds)
    return latency, late


def _cancel_one(client: httpx.Client, take: str, stage: str, wait_s: float) -> float | None:
    """Cancel a job `wait_s` into `stage`; None if it ended before."""
    job_id = _order(client, take, seed=int(wait_s * 1e6))
    sent = None
    for event in _events(client, job_id):
        progress = event["progress"]
        if sent is None and progress and progress["stage"] == stage:
            time.sleep(wait_s)
            sent = time.perf_counter()
            if client.delete(f"/jobs/{job_id}").status_code == 409:
                return None
        if event["state"] == "cancelled" and sent is not None:
            return time.perf_counter() - sent
    return None


def _order(client: httpx.Client, take: str, seed: int) -> str:
    """Ask for a job, and return its id; of each take the worker has yet to encode the prompt."""
    prompt = f"{JOB['prompt']}, {take}"
    answer = client.post("/generate", json=JOB | {"prompt": prompt, "seed": seed})
    job_id: str = answer.raise_for_status().json()["id"]
    return job_id


def _events(client: httpx.Client, job_id: str) -> Any:
    """The data of the job's events, as they come."""
    with client.stream("GET", f"/jobs/{job_id}/events") as answer:
        name = ""
        for line in answer.iter_lines():
            field, _, value = line.partition(": ")
            if field == "event":
                name = value
            elif field == "data" and name in ("state", "progress"):
                yield json.loads(value)


if __name__ == "__main__":
    typer.run(main)
