"""Run a worker with the fake engine in two modes, whose videos of one seed differ.

`python -m tests.service.comparisons.twin_worker SECONDS_PER_STEP`; its settings come from the
environment.
"""

import sys
import time
from collections.abc import Generator
from contextlib import closing

import numpy as np

from jobs.artifacts.known_store import open_known_artifacts
from jobs.catalog import ModeOffer
from jobs.record import Stage
from jobs.redis_client import connect
from jobs.spec import GenerationRequest
from worker.consumer.serve import ServeContext, serve
from worker.engine.fake_engine import FakeEngine
from worker.interface import Frame, JobControl
from worker.process.logs import configure_logging
from worker.settings import WorkerSettings


class TwinEngine(FakeEngine):
    """Draws a square that moves over a pattern; the mode `twin` is a little brighter."""

    modes = (
        ModeOffer(name="plain", description="As it is.", recipe_fingerprint="recipe-1"),
        ModeOffer(name="twin", description="Brighter.", recipe_fingerprint="recipe-2"),
    )

    def _frames(self, request: GenerationRequest, control: JobControl) -> Generator[Frame]:
        draw = np.random.default_rng(request.seed)
        pattern = draw.integers(0, 200, (request.height, request.width, 3)).astype(np.uint8)
        for index in range(request.num_frames):
            control.progress(Stage.VAE, index + 1, request.num_frames)
            frame = pattern + np.uint8(8 * (request.mode == "twin"))
            frame[4:12, index * 4 : index * 4 + 8] = 255
            yield frame


def main() -> None:
    """Serve jobs until the process is told to stop."""
    settings = WorkerSettings()
    ids = configure_logging(settings.log_format)
    engine = TwinEngine(lambda _: time.sleep(float(sys.argv[1])))
    with closing(connect(settings.redis_url.get_secret_value())) as redis:
        artifacts = open_known_artifacts(settings.artifacts_url, redis)
        artifacts.probe()
        status = serve(ServeContext(engine, redis, artifacts), settings, ids)
    sys.exit(status)


if __name__ == "__main__":
    main()
