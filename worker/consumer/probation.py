"""Keep a worker out of service until it has proven that it can end a job.

A worker is on probation at its start and after each fault of its own (`WorkerStats.record_fault`).
It makes a new scratch folder for each proof, so one that was removed costs a second. The pauses
grow with the faults in a row; the process ends after too many (`EXIT_UNFIT`).
"""

from __future__ import annotations

import logging
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Final

from redis.backoff import EqualJitterBackoff
from redis.exceptions import RedisError

from jobs.artifacts.store import ArtifactStore
from jobs.errors import ArtifactsUnavailable, WorkerUnfit
from worker.job.fitness import check_fitness, refused_by_system
from worker.process.drain import Drain
from worker.process.scratch import scratch_folder
from worker.process.stats import WorkerStats

logger = logging.getLogger(__name__)

PAUSES: Final = EqualJitterBackoff(cap=30.0, base=0.5)
"""The pause before a proof, in seconds by the number of faults: up to 1 s after the first, then
twice as long each time. Meanwhile a healthy worker takes the job that was given back."""

_POLL_S: Final = 0.1


class Probation:
    """Makes the scratch folder of one worker, and proves that a job can end there."""

    def __init__(self, stats: WorkerStats, drain: Drain, artifacts: ArtifactStore) -> None:
        self._stats = stats
        self._drain = drain
        self._artifacts = artifacts

    def prove(self, opened: ExitStack) -> Path | None:
        """Return the scratch folder of a worker that has proven itself, and put it into `opened`.

        Otherwise record the fault and return None.
        """
        with ExitStack() as made:
            try:
                scratch = made.enter_context(scratch_folder())
                check_fitness(scratch, self._stats.largest_video_bytes)
                with suppress(RedisError):  # without Redis there are no jobs either
                    self._artifacts.probe()
            except (OSError, WorkerUnfit, ArtifactsUnavailable) as error:
                unfit = refused_by_system(error) if isinstance(error, OSError) else error
                logger.error("out of service: %s", unfit, exc_info=error)
                self._stats.record_fault(str(unfit))
                return None
            opened.enter_context(made.pop_all())
        if self._stats.fault is not None:
            logger.warning("in service again, after: %s", self._stats.fault)
        self._stats.record_proven()
        return scratch

    def wait_until_proven(self, opened: ExitStack) -> Path | None:
        """Try `prove` again after each pause; return None once the process is to end."""
        while self._pause():
            scratch = self.prove(opened)
            if scratch is not None:
                return scratch
        return None

    def _pause(self) -> bool:
        """Wait before the next proof, in short pieces; return whether there is to be one."""
        end = time.monotonic() + PAUSES.compute(self._stats.faults)
        while not self._is_ending and time.monotonic() < end:
            time.sleep(_POLL_S)
        return not self._is_ending

    @property
    def _is_ending(self) -> bool:
        return self._drain.stopping or self._stats.exit_status is not None
