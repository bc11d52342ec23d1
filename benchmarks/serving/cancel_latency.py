"""Measure how soon a cancelled job stops: `python -m benchmarks.serving.cancel_latency`.

The real worker runs the miniature, and each job is cancelled at a random moment of one stage. The
latency is from sending DELETE to receiving the event with the state `cancelled`, which the worker
writes when the device has stopped. The baseline is the longest piece of work in the stage: a
denoising step, a latent frame, the whole text encoder, the whole MP4.

It prints a table, then the result as one line of JSON, and saves it in benchmarks/results/.
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
from jobs.geometry import latent_frames

JOB: dict[str, Any] = {
    "prompt": "a large blue square moving up on a white background",
    "negative_prompt": "blurred",
    "num_frames": 17,
    "num_inference_steps": 8,
}
STAGES = ("text_encoder", "denoise", "vae", "mp4")


def main(
    cancels: Annotated[int, typer.Option(min=1, help="Jobs cancelled in each stage.")] = 30,
    seed: Annotated[int, typer.Option(help="Seed of the random moments.")] = 1,
) -> None:
    """Cancel jobs at random moments and write the result."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="wan-cancel-") as folder:
        environment = {"WORKER_THREADS": "2"}
        with (
            Cluster(Path(folder), apis=1, workers=1, environment=environment) as cluster,
            httpx.Client(base_url=cluster.urls[0], timeout=60) as client,
        ):
            stage_s = _stage_seconds(client)
            latency, late = _cancel_all(client, stage_s, rng, cancels)
    pieces = {
        "text_encoder": stage_s["text_encoder"],
        "denoise": stage_s["denoise"] / JOB["num_inference_steps"],
        "vae": stage_s["vae"] / latent_frames(JOB["num_frames"]),
        "mp4": stage_s["mp4"],
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
    report.save(document)
    print(json.dumps(document))


def _stage_seconds(client: httpx.Client) -> dict[str, float]:
    """Return the seconds of each stage of a job that is not cancelled, after a warm-up job."""
    timings = {}
    for number in range(2):
        job_id = _submit(client, f"whole {number}", seed=7)
        for event in _events(client, job_id):
            if event["state"] == "succeeded":
                break
        timings = client.get(f"/jobs/{job_id}").json()["timings"]
    return {stage: timings[f"{stage}_s"] for stage in STAGES}


def _cancel_all(
    client: httpx.Client, stage_s: dict[str, float], rng: random.Random, cancels: int
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Cancel jobs in each stage; return latencies, and how many jobs ended before the DELETE."""
    latency: dict[str, list[float]] = {stage: [] for stage in STAGES}
    late = dict.fromkeys(STAGES, 0)
    for stage in STAGES:
        for number in range(cancels):
            label = f"{stage} {number}"
            seconds = _cancel_one(client, label, stage, rng.uniform(0, stage_s[stage]))
            if seconds is None:
                late[stage] += 1
            else:
                latency[stage].append(seconds)
    return latency, late


def _cancel_one(client: httpx.Client, label: str, stage: str, wait_s: float) -> float | None:
    """Cancel a job `wait_s` into `stage`; return the latency, None if the job ended before."""
    job_id = _submit(client, label, seed=int(wait_s * 1e6))
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


def _submit(client: httpx.Client, label: str, seed: int) -> str:
    """Submit a job and return its id; each label is another prompt, which is not cached yet."""
    prompt = f"{JOB['prompt']}, {label}"
    response = client.post("/generate", json=JOB | {"prompt": prompt, "seed": seed})
    job_id: str = response.raise_for_status().json()["id"]
    return job_id


def _events(client: httpx.Client, job_id: str) -> Any:
    """Iterate over the data of the job's events as they arrive."""
    with client.stream("GET", f"/jobs/{job_id}/events") as response:
        name = ""
        for line in response.iter_lines():
            field, _, value = line.partition(": ")
            if field == "event":
                name = value
            elif field == "data" and name in ("state", "progress"):
                yield json.loads(value)


if __name__ == "__main__":
    typer.run(main)
