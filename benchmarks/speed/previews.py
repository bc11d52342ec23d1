"""Measure what a preview of a running job costs, beside a step of the same job.

`python -m benchmarks.speed.previews`

The baseline is a denoising step of the miniature in the same run. Two things cost: making the
pictures, for which the job's thread waits (the map and the copy to the host), and encoding them,
which runs beside it in a process of its own, on the host. On a CPU that is shared with the steps,
its CPU time is what a job can take longer at most, once in each `every_s`. The map is timed on
latents of full size, too.

It prints a table, then the result as one line of JSON, and saves it in benchmarks/results/.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks import report
from benchmarks.timing import device_name, medians_ms
from jobs.record import Stage
from jobs.spec import GenerationRequest
from jobs.store.submission import OPEN_OWNER
from worker.config import load_config
from worker.device import pick_device
from worker.engine.wan_engine import WanEngine
from worker.interface import PreviewClip
from worker.job.webp_animation import WebpEncoder
from worker.settings import DeviceChoice
from worker.startup import load_engine

PROMPT = "a small red circle moving right on a black background"
FULL_SIZES = {"832x480": (1, 16, 21, 60, 104), "1280x720": (1, 16, 21, 90, 160)}


class StepTimes:
    """A `JobControl` that times denoising steps, and makes a preview after each of them."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.clips: list[PreviewClip] = []
        self._since = 0.0

    def progress(self, stage: Stage, step: int, steps: int) -> None:
        """Note how long the step took."""
        now = time.perf_counter()
        if stage is Stage.DENOISE and step > 0:
            self.seconds.append(now - self._since)
        self._since = now

    def check(self) -> None:
        """Do nothing; nobody cancels it."""

    def preview(self, step: int, steps: int, make: Callable[[], PreviewClip]) -> None:
        """Make a preview, outside of the time of the steps."""
        self.clips.append(make())
        self._since = time.perf_counter()


def main(
    config: Annotated[Path, typer.Option(help="The worker's configuration.")] = Path(
        "deploy/wan-mini.toml"
    ),
    steps: Annotated[int, typer.Option(min=4, help="Denoising steps of the job.")] = 20,
    rounds: Annotated[int, typer.Option(min=3, help="Timings that count.")] = 9,
    device: Annotated[DeviceChoice, typer.Option(help="Where to run.")] = "cpu",
) -> None:
    """Measure a step, the map on latents of several sizes, and the encoding."""
    chosen = pick_device(device, torch.get_num_threads())
    engine = load_engine(load_config(config), chosen)
    control = StepTimes()
    _generate(engine, control, steps)
    step_ms = 1000 * statistics.median(control.seconds[1:])
    rows = report.log_rows(_rows(engine, control.clips[-1], step_ms, rounds))
    settings = {
        "steps": steps,
        "rounds": rounds,
        "statistic": "median",
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "job": "the miniature, 96x96, 17 frames, bf16",
        "preview bytes": len(WebpEncoder().encode(control.clips[-1]) or b""),
    }
    document = report.result("previews", device_name(chosen.torch_device), settings, rows)
    report.print_table(rows)
    report.save(document)
    print(json.dumps(document))


def _generate(engine: WanEngine, control: StepTimes, steps: int) -> None:
    request = GenerationRequest(
        prompt=PROMPT,
        negative_prompt="",
        mode="bf16",
        size=engine.model.default_size,
        num_frames=engine.model.default_frames,
        num_inference_steps=steps,
        guidance_scale=engine.model.default_guidance_scale,
        seed=7,
        model=engine.model.name,
    )
    engine.generate(request, control, OPEN_OWNER).frames.close()


def _rows(engine: WanEngine, clip: PreviewClip, step_ms: float, rounds: int) -> list[report.Row]:
    preview, device = engine.components.preview, engine.device.torch_device
    assert preview is not None, "the model has no preview map"
    frames, height, width, _ = clip.frames.shape
    own = torch.randn(1, 16, frames, height // 2, width // 2, device=device)
    runs: dict[str, Callable[[], object]] = {"miniature": partial(preview.clip, own)}
    for name, shape in FULL_SIZES.items():
        runs[name] = partial(preview.clip, torch.randn(shape, device=device))
    found = medians_ms(runs, device, rounds)
    rows = [report.Row("miniature, pictures beside a step", found["miniature"], "ms", step_ms)]
    rows += [report.Row(f"{name}, 81 frames, pictures", found[name], "ms") for name in FULL_SIZES]
    encoder = WebpEncoder()
    wall_ms, cpu_ms = _encoding_ms(lambda: encoder.encode(clip), rounds)
    rows.append(report.Row("miniature, encoding beside the job, wall", wall_ms, "ms", step_ms))
    rows.append(report.Row("miniature, encoding beside the job, CPU", cpu_ms, "ms", step_ms))
    return rows


def _encoding_ms(encode: Callable[[], object], rounds: int) -> tuple[float, float]:
    """Return the median milliseconds of an encoding: on the clock, and of CPU time."""
    wall, cpu = list[float](), list[float]()
    for _ in range(rounds):
        started, before = time.perf_counter(), os.times()
        encode()
        after = os.times()
        wall.append(time.perf_counter() - started)
        cpu.append(
            after.children_user
            + after.children_system
            - before.children_user
            - before.children_system
        )
    return round(1000 * statistics.median(wall), 2), round(1000 * statistics.median(cpu), 2)


if __name__ == "__main__":
    typer.run(main)
