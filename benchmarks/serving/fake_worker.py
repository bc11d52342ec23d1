"""Run a worker whose engine only sleeps.

Usage: `python -m benchmarks.serving.fake_worker SECONDS_PER_STEP`. It processes jobs at a known
rate and leaves the cores to what is measured.
"""

import sys
import time
from contextlib import closing

from jobs.artifacts.known_store import open_known_artifacts
from jobs.redis_client import connect
from jobs.telemetry import tracing
from worker.consumer.serve import ServeContext, serve
from worker.engine.fake_engine import FakeEngine
from worker.process.logs import configure_logging
from worker.settings import WorkerSettings


def main() -> None:
    """Serve jobs until the process is told to stop."""
    step_s = float(sys.argv[1])
    settings = WorkerSettings()
    ids = configure_logging(settings.log_format)
    tracing.start(settings, "wan-worker")
    engine = FakeEngine(lambda _: time.sleep(step_s))
    with closing(connect(settings.redis_url.get_secret_value())) as redis:
        artifacts = open_known_artifacts(settings.artifacts_url, redis)
        artifacts.probe()
        status = serve(ServeContext(engine, redis, artifacts), settings, ids)
    tracing.stop()
    sys.exit(status)


if __name__ == "__main__":
    main()
