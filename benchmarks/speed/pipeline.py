"""Measure whole jobs through the real worker and service.

`python -m benchmarks.speed.pipeline --config TOML --keep FOLDER`

First, this process runs the bare pipeline: the engine's frames are encoded to an MP4, without
queue, service and store. Then it starts Valkey, one API process and one worker with the same
configuration, and sends jobs over HTTP: jobs of each mode, compared with the bare pipeline stage by
stage; a job that is cancelled while it denoises; and a job that fails because this process has
allocated the device's memory, after which the worker must succeed again.

Each job that counts has its own prompt to encode, as callers' jobs have. The negative prompt is the
same for all, and cached since the first job, which does not count. The video of that job in each
mode, with the same request, and the worker's log are saved in `--keep`.

It prints a table, then the result as one line of JSON, and saves it in benchmarks/results/.
"""

from __future__ import annotations

import gc
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict
from operator import itemgetter
from pathlib import Path
from typing import Annotated, Any

import httpx
import torch
import typer

from benchmarks import report
from benchmarks.report import Row
from deploy.local.cluster import Cluster
from jobs.record import Stage
from jobs.spec import GenerationRequest
from jobs.store.submission import OPEN_OWNER
from worker.config import load_config
from worker.device import pick_device
from worker.engine.wan_engine import WanEngine
from worker.interface import PreviewClip
from worker.job.mp4_encoder import VideoFormat, encode_mp4
from worker.settings import DeviceChoice
from worker.startup import load_engine, paused_gc

PROMPT = "a small red circle moving right on a black background"
STAGES = ("text_encoder_s", "denoise_s", "vae_s", "mp4_s")
WHOLE = "whole_s"
FREE_BYTES = 1 << 30
"""Bytes of the device's memory that stay free for the job that fails."""

Seconds = dict[str, float]


class IgnoringControl:
    """A `JobControl` that ignores progress and never stops the job."""

    def progress(self, stage: Stage, step: int, steps: int) -> None: ...

    def check(self) -> None: ...

    def preview(self, step: int, steps: int, make: Callable[[], PreviewClip]) -> None: ...


def main(  # noqa: PLR0913, PLR0917 (typer's way: the signature is the command line)
    config: Annotated[Path, typer.Option(help="The worker's configuration.")],
    keep: Annotated[Path, typer.Option(help="Where videos and log are left.")],
    size: str = "832x480",
    frames: int = 49,
    steps: int = 4,
    rounds: Annotated[int, typer.Option(min=1, help="Jobs of each mode that count.")] = 2,
    device: str = "cuda",
    large: Annotated[str, typer.Option(help="SIZE:FRAMES that need memory.")] = "1280x720:81",
) -> None:
    """Run all measurements and write the result."""
    keep.mkdir(parents=True, exist_ok=True)
    body = {"size": size, "num_frames": frames, "num_inference_steps": steps, "seed": 7}
    modes = [mode.name for mode in load_config(config).modes]
    name, bare = run_bare(config, device, modes, body, rounds)
    rows = []
    environment = {
        "WORKER_DEVICE": device,
        "WORKER_CONFIG": str(config.resolve()),
        "WORKER_THREADS": "8",
    }
    with (
        tempfile.TemporaryDirectory(prefix="wan-pipeline-") as folder,
        Cluster(Path(folder), apis=1, workers=1, environment=environment) as cluster,
    ):
        try:
            for mode in modes:
                served = []
                for number in range(rounds + 1):
                    prompt = {"prompt": _prompt(mode, number)}
                    seconds, video = run_served(cluster, mode, body | prompt)
                    if number:
                        served.append(seconds)
                    else:
                        (keep / f"{mode}.mp4").write_bytes(video)
                rows += report.log_rows(compare(mode, bare[mode], served))
            rows += report.log_rows(cancel(cluster, modes[-1], body))
            if device == "cuda":
                rows += report.log_rows(run_out_of_memory(cluster, modes, body, large))
        finally:
            shutil.copy(cluster.folder / "logs" / "worker-0.log", keep / "worker.log")
    recipes = {mode.name: mode.recipe for mode in load_config(config).modes}
    settings = body | {"rounds": rounds, "modes": recipes, "large": large}
    document = report.result("pipeline", name, settings, rows)
    report.print_table(rows)
    report.save(document)
    print(json.dumps(document))


def run_bare(
    config: Path, device: str, modes: list[str], body: dict[str, Any], rounds: int
) -> tuple[str, dict[str, list[Seconds]]]:
    """Return the device's name, and the seconds of runs in each mode without service and queue."""
    choice: DeviceChoice = "cuda" if device == "cuda" else "cpu"
    on = pick_device(choice, 8)
    with paused_gc():  # as in a worker
        engine = load_engine(load_config(config), on)
    found: dict[str, list[Seconds]] = {mode: [] for mode in modes}
    for mode in modes:
        for number in range(rounds + 1):
            prompt = {"prompt": _prompt(mode, number)}
            seconds = bare_seconds(engine, mode, body | prompt)
            if number:
                found[mode].append(seconds)
    del engine
    gc.unfreeze()
    gc.collect()
    on.empty_cache()
    return on.name, found


def _prompt(mode: str, number: int) -> str:
    return f"{PROMPT}, take {number} for {mode}" if number else PROMPT


def bare_seconds(engine: WanEngine, mode: str, body: dict[str, Any]) -> Seconds:
    request = GenerationRequest(
        negative_prompt=engine.model.default_negative_prompt,
        mode=mode,
        guidance_scale=engine.model.default_guidance_scale,
        model=engine.model.name,
        **body,
    )
    target = VideoFormat(request.width, request.height, request.num_frames, engine.model.fps)
    started = time.perf_counter()
    control = IgnoringControl()
    clip = engine.generate(request, control, OPEN_OWNER)
    with tempfile.TemporaryDirectory() as folder, closing(clip.frames):
        file = Path(folder) / "video.mp4"
        mp4 = encode_mp4(clip.frames, file, target, title="bare", metadata={}, check=control.check)
    whole_s = time.perf_counter() - started
    return asdict(clip.seconds) | {"mp4_s": mp4.waited_s, WHOLE: whole_s}


def run_served(cluster: Cluster, mode: str, body: dict[str, Any]) -> tuple[Seconds, bytes]:
    """Run one job over HTTP; return the seconds of its stages and of the whole, and its video.

    The whole is from sending the request to the event of its success.
    """
    # Connect before the measurement: setting up TLS alone takes a client 25 ms or more.
    with httpx.Client(base_url=cluster.urls[0], timeout=600) as client:
        client.get("/healthz").raise_for_status()
        started = time.perf_counter()
        response = client.post("/generate", json={"mode": mode} | body)
        job_id = response.raise_for_status().json()["id"]
        _follow(client, job_id, until="succeeded")
        whole_s = time.perf_counter() - started
        job = client.get(f"/jobs/{job_id}").raise_for_status().json()
        assert job["state"] == "succeeded", job
        video = client.get(job["video"]["url"]).raise_for_status().content
    assert len(video) == job["video"]["bytes"]
    return {stage: job["timings"][stage] for stage in STAGES} | {WHOLE: whole_s}, video


def compare(mode: str, bare: list[Seconds], served: list[Seconds]) -> list[Row]:
    """Return a mode's rows: the whole job and each stage, against the bare pipeline.

    The rest of a served job is the time in the service, the queue and the store.
    """

    def row(what: str, of: Callable[[Seconds], float]) -> Row:
        ours, theirs = (round(statistics.median(map(of, each)), 3) for each in (served, bare))
        return Row(f"{mode}: {what}", ours, "s", baseline=theirs)

    def rest(seconds: Seconds) -> float:
        return seconds[WHOLE] - sum(seconds[stage] for stage in STAGES)

    rows = [row("job through the service (baseline: bare pipeline)", itemgetter(WHOLE))]
    rows += [row(stage.removesuffix("_s"), itemgetter(stage)) for stage in STAGES]
    return [*rows, row("rest", rest)]


def cancel(cluster: Cluster, mode: str, body: dict[str, Any]) -> list[Row]:
    """Cancel a job in its second step and measure until its end, which may take one step."""
    job_id = cluster.submit(prompt=PROMPT, mode=mode, **body)
    cluster.wait_for_step(job_id, 1, limit_s=300)
    with httpx.Client(base_url=cluster.urls[0], timeout=600) as client:
        started = time.perf_counter()
        client.delete(f"/jobs/{job_id}").raise_for_status()
        _follow(client, job_id, until="cancelled")
        seconds = time.perf_counter() - started
        (worker,) = client.get("/workers").raise_for_status().json()["workers"]
    step_s = worker["modes"][mode]["step_s"]
    what = f"{mode}: from a cancel while denoising to its end (baseline: one step)"
    return [Row(what, round(seconds, 3), "s", baseline=round(step_s, 3))]


def run_out_of_memory(
    cluster: Cluster, modes: list[str], body: dict[str, Any], large: str
) -> list[Row]:
    """Allocate the memory so that a large job fails, free it, and check that another succeeds."""
    size, _, frames = large.partition(":")
    free, _ = torch.cuda.mem_get_info()
    ballast = torch.empty(max(0, free - FREE_BYTES), dtype=torch.uint8, device="cuda")
    big = body | {"size": size, "num_frames": int(frames)}
    prompt = f"{PROMPT}, in little memory"
    job = cluster.wait_for_end(cluster.submit(prompt=prompt, mode=modes[0], **big), limit_s=300)
    assert job["state"] == "failed", job
    assert job["failure"]["code"] == "out_of_device_memory", job["failure"]
    del ballast
    torch.cuda.empty_cache()
    started = time.perf_counter()
    prompt = f"{PROMPT}, with memory again"
    after = cluster.wait_for_end(cluster.submit(prompt=prompt, mode=modes[-1], **body), limit_s=300)
    assert after["state"] == "succeeded", after
    return [
        Row(
            f"{modes[0]}: {large} with {FREE_BYTES >> 30} GiB left ended as out_of_device_memory; "
            f"the next {modes[-1]} job succeeded",
            round(time.perf_counter() - started, 3),
            "s",
        ),
        Row("processes started again meanwhile", cluster.restarts, ""),
    ]


def _follow(client: httpx.Client, job_id: str, until: str) -> None:
    with client.stream("GET", f"/jobs/{job_id}/events") as events:
        for line in events.iter_lines():
            if line.startswith("data:") and f'"{until}"' in line:
                return


if __name__ == "__main__":
    typer.run(main)
