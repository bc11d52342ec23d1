"""Run a worker whose engine draws a moving square, in two modes: `python -m … SECONDS_PER_STEP`.

A page cannot tell it from a worker with a model. Its frames move, unlike those of the fake engine,
so that a test sees whether a video plays. It needs no torch, and its settings come from the
environment. A prompt that contains a key of `FAULTS` fails like that.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Generator
from contextlib import closing

import numpy as np

from jobs.artifacts.known_store import open_known_artifacts
from jobs.catalog import ModeOffer, WordGroup
from jobs.errors import GenerationFailed, GenerationTimedOut, PromptTooLong
from jobs.record import Stage
from jobs.redis_client import connect
from jobs.spec import GenerationRequest
from worker.consumer.serve import ServeContext, serve
from worker.engine.fake_engine import FakeEngine
from worker.interface import Clip, Frame, JobControl
from worker.process.logs import configure_logging
from worker.settings import WorkerSettings

FAULTS = {
    "out of memory": MemoryError("there is none left"),
    "too long": PromptTooLong("The prompt has 90 tokens; at most 64 are possible."),
    "too slow": GenerationTimedOut("The attempt took longer than 60 s."),
    "fail": GenerationFailed("The frames hold values that are not numbers."),
}


class DrawingEngine(FakeEngine):
    """Draws a square that moves from left to right, brighter in one mode than in the other."""

    model = FakeEngine.model.model_copy(
        update={
            "name": "drawing",
            "sizes": ("96x64", "64x64"),
            "default_size": "96x64",
            "max_frames": 33,
            "default_frames": 17,
            "default_steps": 8,
            "default_guidance_scale": 4.0,
            "default_mode": "w8a8",
            "max_prompt_tokens": 64,
            "default_negative_prompt": "blurry",
            "vocabulary": (
                WordGroup(kind="colour", phrases=("red", "blue")),
                WordGroup(kind="shape", phrases=("square",)),
            ),
            "prompt_template": "a COLOUR SHAPE moving right",
            "example_prompts": ("a red square moving right", "a blue square moving right"),
        }
    )
    modes = (
        ModeOffer(name="bf16", description="The model as it was trained."),
        ModeOffer(name="w8a8", description="In 8 bits.", recipe_fingerprint="recipe-1"),
    )

    def generate(self, request: GenerationRequest, control: JobControl, owner: str) -> Clip:
        for text, error in FAULTS.items():
            if text in request.prompt:
                raise error
        return super().generate(request, control, owner)

    def _frames(self, request: GenerationRequest, control: JobControl) -> Generator[Frame]:
        side = request.height // 3
        way = request.width - side
        for index in range(request.num_frames):
            control.check()
            control.progress(Stage.VAE, index + 1, request.num_frames)
            frame = np.full((request.height, request.width, 3), 24, np.uint8)
            x = way * index // max(1, request.num_frames - 1)
            blue = 220 if "blue" in request.prompt else 40
            frame[side : 2 * side, x : x + side] = (250 - blue, 60, blue)
            if request.mode == "bf16":
                frame[:4] = 200
            yield frame


def main() -> None:
    step_s = float(sys.argv[1])
    settings = WorkerSettings()
    ids = configure_logging(settings.log_format)
    with closing(connect(settings.redis_url.get_secret_value())) as redis:
        artifacts = open_known_artifacts(settings.artifacts_url, redis)
        artifacts.probe()
        engine = DrawingEngine(lambda _: time.sleep(step_s))
        status = serve(ServeContext(engine, redis, artifacts), settings, ids)
    sys.exit(status)


if __name__ == "__main__":
    main()
