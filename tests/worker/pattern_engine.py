"""A second engine: coloured frames at once, no model; what the queue side does with any engine.

Run as a program it is a whole worker process: `python -m tests.worker.pattern_engine REDIS_URL
ARTIFACTS_FOLDER SECONDS_PER_STEP [FAULT]`, with the worker's other settings from its environment.
A fault is a name in `FAULTS`, or the process id of the Redis that is to be lost before a claim.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Generator
from contextlib import closing
from pathlib import Path

import numpy as np
from rq.job import Job

from jobs.artifacts.folder import FolderArtifactStore
from jobs.catalog import ModelOffer, ModeOffer
from jobs.errors import GenerationFailed
from jobs.record import Stage
from jobs.redis_client import connect
from jobs.spec import GenerationRequest
from tests.worker.orders import FAILING
from worker.consumer import serve
from worker.consumer.rq_worker import ResidentWorker
from worker.device import Device
from worker.engine.interface import Clip, Frame, StageSeconds, Watch
from worker.process.logs import configure_logging
from worker.settings import WorkerSettings

OnStep = Callable[[int], None]


class PatternEngine:
    """Every frame has one colour, drawn from the seed. `on_step` may wait or raise."""

    device = Device("cpu", "none")
    tokenizer_text = None
    model = ModelOffer(
        name="pattern",
        fingerprint="none",
        sizes=("64x32",),
        default_size="64x32",
        min_frames=1,
        max_frames=9,
        default_frames=9,
        fps=8,
        max_steps=1000,
        default_steps=4,
        default_guidance_scale=1.0,
        default_mode="plain",
        max_prompt_chars=100,
    )
    modes = (ModeOffer(name="plain", description="One colour.", recipe_fingerprint="recipe-1"),)

    def __init__(self, on_step: OnStep = lambda step: None) -> None:
        self._on_step = on_step
        self.owners: list[str] = []

    def generate(self, request: GenerationRequest, watch: Watch, owner: str) -> Clip:
        self.owners.append(owner)
        if FAILING in request.prompt:
            raise GenerationFailed("The prompt asks for a failure.")
        watch.progress(Stage.TEXT_ENCODER, 1, 1)
        watch.progress(Stage.DENOISE, 0, request.num_inference_steps)
        for step in range(1, request.num_inference_steps + 1):
            self._on_step(step)
            watch.progress(Stage.DENOISE, step, request.num_inference_steps)
        seconds = StageSeconds(text_encoder_s=0.5, denoise_s=1.5, vae_s=0.25)
        return Clip(self._frames(request, watch), request.num_frames, seconds)

    def _frames(self, request: GenerationRequest, watch: Watch) -> Generator[Frame]:
        for index in range(request.num_frames):
            watch.progress(Stage.VAE, index + 1, request.num_frames)
            yield np.full((request.height, request.width, 3), request.seed % 256, np.uint8)


def hang() -> None:
    """In native code, where Python reaches no thread."""
    ctypes.CDLL(None).sleep(600)


def run_out_of_memory() -> None:
    raise MemoryError("there is none left")


FAULTS = {"hang": hang, "oom": run_out_of_memory}


class Unlucky(ResidentWorker):
    """Loses its Redis, once, when it has taken a job and not yet claimed it."""

    redis_pid = 0

    def prepare_job_execution(self, job: Job, remove_from_intermediate_queue: bool = False) -> None:
        super().prepare_job_execution(job, remove_from_intermediate_queue)
        if Unlucky.redis_pid:
            os.kill(Unlucky.redis_pid, signal.SIGKILL)
            Unlucky.redis_pid = 0


def main() -> None:
    redis_url, artifacts, seconds, *fault = sys.argv[1:]
    if fault and fault[0].isdecimal():
        Unlucky.redis_pid = int(fault.pop())
        setattr(serve, "ResidentWorker", Unlucky)  # noqa: B010  # a module's, and not its own

    def on_step(step: int) -> None:
        time.sleep(float(seconds))
        if fault and step == 3:
            FAULTS[fault[0]]()

    settings = WorkerSettings(artifacts_url=Path(artifacts).resolve().as_uri())
    ids = configure_logging(settings.log_format)
    engine, store = PatternEngine(on_step), FolderArtifactStore(Path(artifacts))
    with closing(connect(redis_url)) as redis:
        status = serve.serve(serve.Parts(engine, redis, store), settings, ids)
    sys.exit(status)


if __name__ == "__main__":
    main()
