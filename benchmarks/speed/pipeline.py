"""Whole jobs through the real worker and service: `python -m benchmarks.speed.pipeline --config
TOML`.

First the bare pipeline, in this process: the engine's frames into an MP4, with no queue, no service
and no store. Then Valkey, one API process and one worker on the same configuration, over HTTP:
jobs of each mode, whose overhead is what they take longer than the bare ones, stage by stage; a job
that is cancelled while it denoises; and one that finds the device's memory taken by somebody else
(this process), after which the worker has to be of use again. Each job that counts has a prompt of
its own to encode, as a caller's has; the negative prompt is everybody's, and known from the first
job, which does not count. That job's video, the same order in each mode, and the worker's log are
left in `--keep`.

Prints a table, then the result as one line of JSON, and keeps it in benchmarks/results/.
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
from worker.job.mp4_encoder import VideoFormat, encode_mp4
from worker.settings import DeviceChoice
from worker.startup import load_engine, resting_collector

PROMPT = "a small red circle moving right on a black background"
STAGES = ("text_encoder_s", "denoise_s", "vae_s", "mp4_s")
WHOLE = "whole_s"
ROOM_LEFT = 1 << 30
"""Bytes of the device that a job finds free when the memory is taken."""

Seconds = dict[str, float]


class Unwatched:
    """A `JobControl` that nobody listens to."""

    def progress(self, stage: Stage, step: int, steps: int) -> None: ...

    def check(self) -> None: ...


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
    """Measure jobs, bare and served."""
    keep.mkdir(parents=True, exist_ok=True)
    order = {"size": size, "num_frames": frames, "num_inference_steps": steps, "seed": 7}
    modes = [mode.name for mode in load_config(config).modes]
    name, bare = run_bare(config, device, modes, order, rounds)
    rows = []
    environment = {
        "WORKER_DEVICE": device,
        "WORKER_CONFIG": str(config.resolve()),
        "WORKER_THREADS": "8",
    }
    with (
        tempfile.TemporaryDirectory(prefix="wan-pipeline-") as folder,
        Cluster(Path(folder), apis=1, workers=1, environment=environment) as site,
    ):
        try:
            for mode in modes:
                served = []
                for number in range(rounds + 1):
                    prompt = {"prompt": _prompt(mode, number)}
                    seconds, video = run_served(site, mode, order | prompt)
                    if number:
                        served.append(seconds)
                    else:
                        (keep / f"{mode}.mp4").write_bytes(video)
                rows += report.tell(compare(mode, bare[mode], served))
            rows += report.tell(cancel(site, modes[-1], order))
            if device == "cuda":
                rows += report.tell(run_out_of_memory(site, modes, order, large))
        finally:
            shutil.copy(site.folder / "logs" / "worker-0.log", keep / "worker.log")
    recipes = {mode.name: mode.recipe for mode in load_config(config).modes}
    settings = order | {"rounds": rounds, "modes": recipes, "large": large}
    document = report.result("pipeline", name, settings, rows)
    report.print_table(rows)
    report.keep(document)
    print(json.dumps(document))


def run_bare(
    config: Path, device: str, modes: list[str], order: dict[str, Any], rounds: int
) -> tuple[str, dict[str, list[Seconds]]]:
    """Seconds of each run in each mode, without service and queue; and the device's name."""
    choice: DeviceChoice = "cuda" if device == "cuda" else "cpu"
    on = pick_device(choice, 8)
    with resting_collector():  # as a worker does
        engine = load_engine(load_config(config), on)
    found: dict[str, list[Seconds]] = {mode: [] for mode in modes}
    for mode in modes:
        for number in range(rounds + 1):
            prompt = {"prompt": _prompt(mode, number)}
            seconds = _bare_seconds(engine, mode, order | prompt)
            if number:
                found[mode].append(seconds)
    del engine
    gc.unfreeze()
    gc.collect()
    on.empty_cache()
    return on.name, found


def _prompt(mode: str, number: int) -> str:
    return f"{PROMPT}, take {number} for {mode}" if number else PROMPT


def _bare_seconds(engine: WanEngine, mode: str, order: dict[str, Any]) -> Seconds:
    request = GenerationRequest(
        negative_prompt=engine.model.default_negative_prompt,
        mode=mode,
        guidance_scale=engine.model.default_guidance_scale,
        model=engine.model.name,
        **order,
    )
    target = VideoFormat(request.width, request.height, request.num_frames, engine.model.fps)
    started = time.perf_counter()
    watch = Unwatched()
    clip = engine.generate(request, watch, OPEN_OWNER)
    with tempfile.TemporaryDirectory() as folder, closing(clip.frames):
        file = Path(folder) / "video.mp4"
        mp4 = encode_mp4(clip.frames, file, target, title="bare", facts={}, check=watch.check)
    whole_s = time.perf_counter() - started
    return asdict(clip.seconds) | {"mp4_s": mp4.waited_s, WHOLE: whole_s}


def run_served(site: Cluster, mode: str, order: dict[str, Any]) -> tuple[Seconds, bytes]:
    """One job over HTTP, from sending the request to the news of its success, and its stages; and
    its video."""
    # A client has its connections already: making ready for TLS alone takes it 25 ms and more.
    with httpx.Client(base_url=site.urls[0], timeout=600) as client:
        client.get("/healthz").raise_for_status()
        started = time.perf_counter()
        answer = client.post("/generate", json={"mode": mode} | order)
        job_id = answer.raise_for_status().json()["id"]
        _follow(client, job_id, until="succeeded")
        whole_s = time.perf_counter() - started
        job = client.get(f"/jobs/{job_id}").raise_for_status().json()
        assert job["state"] == "succeeded", job
        video = client.get(job["video"]["url"]).raise_for_status().content
    assert len(video) == job["video"]["bytes"]
    return {stage: job["timings"][stage] for stage in STAGES} | {WHOLE: whole_s}, video


def compare(mode: str, bare: list[Seconds], served: list[Seconds]) -> list[Row]:
    """A mode's rows: the whole job beside the bare pipeline, and where the seconds of both went.

    The rest of a served job is its way through the service, the queue and the store.
    """

    def row(what: str, of: Callable[[Seconds], float]) -> Row:
        ours, theirs = (round(statistics.median(map(of, each)), 3) for each in (served, bare))
        return Row(f"{mode}: {what}", ours, "s", baseline=theirs)

    def rest(seconds: Seconds) -> float:
        return seconds[WHOLE] - sum(seconds[stage] for stage in STAGES)

    rows = [row("job through the service (baseline: bare pipeline)", itemgetter(WHOLE))]
    rows += [row(stage.removesuffix("_s"), itemgetter(stage)) for stage in STAGES]
    return [*rows, row("rest", rest)]


def cancel(site: Cluster, mode: str, order: dict[str, Any]) -> list[Row]:
    """Cancel a job in its second step; a step is the longest that may pass."""
    job_id = site.submit(prompt=PROMPT, mode=mode, **order)
    site.wait_for_step(job_id, 1, limit_s=300)
    with httpx.Client(base_url=site.urls[0], timeout=600) as client:
        started = time.perf_counter()
        client.delete(f"/jobs/{job_id}").raise_for_status()
        _follow(client, job_id, until="cancelled")
        seconds = time.perf_counter() - started
        (worker,) = client.get("/workers").raise_for_status().json()["workers"]
    step_s = worker["modes"][mode]["step_s"]
    what = f"{mode}: from a cancel while denoising to its end (baseline: one step)"
    return [Row(what, round(seconds, 3), "s", baseline=round(step_s, 3))]


def run_out_of_memory(
    site: Cluster, modes: list[str], order: dict[str, Any], large: str
) -> list[Row]:
    """Take the memory, have a large job fail for it, give it back, and have another succeed."""
    size, _, frames = large.partition(":")
    free, _ = torch.cuda.mem_get_info()
    ballast = torch.empty(max(0, free - ROOM_LEFT), dtype=torch.uint8, device="cuda")
    big = order | {"size": size, "num_frames": int(frames)}
    prompt = f"{PROMPT}, in little memory"
    job = site.wait_for_end(site.submit(prompt=prompt, mode=modes[0], **big), limit_s=300)
    assert job["state"] == "failed", job
    assert job["failure"]["code"] == "out_of_device_memory", job["failure"]
    del ballast
    torch.cuda.empty_cache()
    started = time.perf_counter()
    prompt = f"{PROMPT}, with memory again"
    after = site.wait_for_end(site.submit(prompt=prompt, mode=modes[-1], **order), limit_s=300)
    assert after["state"] == "succeeded", after
    return [
        Row(
            f"{modes[0]}: {large} with {ROOM_LEFT >> 30} GiB left ended as out_of_device_memory; "
            f"the next {modes[-1]} job succeeded",
            round(time.perf_counter() - started, 3),
            "s",
        ),
        Row("processes started again meanwhile", site.restarts, ""),
    ]


def _follow(client: httpx.Client, job_id: str, until: str) -> None:
    with client.stream("GET", f"/jobs/{job_id}/events") as events:
        for line in events.iter_lines():
            if line.startswith("data:") and f'"{until}"' in line:
                return


if __name__ == "__main__":
    typer.run(main)
