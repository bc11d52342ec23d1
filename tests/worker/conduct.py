"""What the tests of worker processes share: starting them, and waiting for what they do."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from jobs import catalog
from jobs.record import JobRecord
from jobs.state import JobState
from jobs.store.job_store import JobStore
from tests.worker.orders import order
from tests.worker.pattern_engine import PatternEngine

ROOT = Path(__file__).resolve().parents[2]
ORDER = order(model="pattern", mode="plain", size="64x32", num_frames=9)
QUEUE = catalog.queue_name(PatternEngine.model, PatternEngine.modes)


class Crew:
    """Worker processes over one Redis and one folder of artifacts; `dismiss` leaves none behind."""

    def __init__(self, redis_url: str, folder: Path) -> None:
        self.artifacts = folder / "artifacts"
        self.log = folder / "worker.log"
        self._redis_url = redis_url
        self._started: list[subprocess.Popen[bytes]] = []

    def hire(
        self, seconds_per_step: float, fault: str | None = None, **settings: str
    ) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "tests.worker.pattern_engine"]
        command += [self._redis_url, str(self.artifacts), str(seconds_per_step)]
        command += [fault] if fault else []
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                command, cwd=ROOT, env=os.environ | settings, stderr=log, stdout=log
            )
        self._started.append(process)
        return process

    def dismiss(self) -> None:
        for process in self._started:
            process.kill()
            process.wait()

    def says(self) -> str:
        return self.log.read_text(encoding="utf-8")


def wait_for(
    store: JobStore, job_id: str, reached: Callable[[JobRecord], bool], seconds: float = 60
) -> JobRecord:
    deadline = time.monotonic() + seconds
    while not reached(record := store.get(job_id)):
        assert time.monotonic() < deadline, f"still {record}"
        time.sleep(0.05)
    return record


def is_denoising(record: JobRecord) -> bool:
    progress = record.progress
    return progress is not None and progress.stage == "denoise" and progress.step > 0


def has_ended(record: JobRecord) -> bool:
    return JobState(record.state).is_terminal
