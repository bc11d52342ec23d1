"""Keep a process' statistics from job to job: step times, memory and other faults, exit status.

They outlive every loss of the connection to Redis.
"""

from __future__ import annotations

import statistics
import threading
from collections import defaultdict, deque
from collections.abc import Sequence
from typing import Final

from jobs.record import Stage
from jobs.store.workers import ModeStatus
from worker.errors import EXIT_DEVICE_LOST, EXIT_OUT_OF_MEMORY, EXIT_UNFIT
from worker.interface import ActShares, AttentionShares
from worker.process.redis_retry import RedisOutage

KEPT: Final = 50
"""The number of latest durations kept of each kind of step."""

OUT_OF_MEMORY_LIMIT: Final = 2
"""Jobs in a row that run out of memory before the process ends."""


FAULT_LIMIT: Final = 5
"""Faults of the worker in a row, in jobs or in proofs (`worker/job/fitness.py`), before the process
ends."""


class StepTimes:
    """The latest durations of steps in seconds, by the shape of the request and the stage."""

    def __init__(self) -> None:
        self._seconds: dict[tuple[str, Stage], deque[float]] = defaultdict(
            lambda: deque(maxlen=KEPT)
        )

    def add(self, shape: str, stage: Stage, seconds: float) -> None:
        """Add the duration of one step."""
        self._seconds[shape, stage].append(seconds)

    def median(self, shape: str, stage: Stage) -> float | None:
        """Return the median duration of a step; None if none was measured."""
        found = self._seconds.get((shape, stage))
        return statistics.median(found) if found else None

    def percentile_90(self, shape: str, stage: Stage) -> float | None:
        """Return the duration that one step in ten exceeds; with fewer than ten, the longest."""
        found = sorted(self._seconds.get((shape, stage), ()))
        return found[(9 * len(found) - 1) // 10] if found else None


class WorkerStats:
    """The statistics of one process. Jobs write them in turn; another thread reads the status.

    Attributes:
        exit_status: the status to end the process with now; None while it can run another job.
        fault: what is wrong with the worker, as a sentence; it takes no job until this is None.
        faults: the faults in a row; it is 0 again after a success.
        largest_video_bytes: the size of the largest video that the process has made.
    """

    def __init__(self) -> None:
        self.outage = RedisOutage()
        self.step_times = StepTimes()
        self.exit_status: int | None = None
        self.fault: str | None = None
        self.faults = 0
        self.largest_video_bytes = 0
        self._out_of_memory = 0
        self._lock = threading.Lock()
        self._done = 0
        self._steps: dict[str, deque[float]] = {}
        self._shares: dict[str, ActShares] = {}
        self._attention: dict[str, AttentionShares] = {}

    def record_success(self, video_bytes: int = 0) -> None:
        """Count a job that succeeded with a video of this size."""
        self._out_of_memory = self.faults = 0
        self.largest_video_bytes = max(self.largest_video_bytes, video_bytes)
        with self._lock:
            self._done += 1

    def record_out_of_memory(self) -> None:
        """Count a job that ran out of memory; the second in a row ends the process.

        In a row means without a success in between. Then either no job fits any more or memory
        leaks, and a new process starts with all of it.
        """
        self._out_of_memory += 1
        if self._out_of_memory >= OUT_OF_MEMORY_LIMIT:
            self.exit_status = EXIT_OUT_OF_MEMORY

    def record_fault(self, reason: str) -> None:
        """Take the worker out of service for a reason; after too many in a row, end the process.

        In a row means without a success in between. A new process may find what this one cannot
        mend, such as a folder that its supervisor makes.
        """
        self.fault = reason
        self.faults += 1
        if self.faults >= FAULT_LIMIT:
            self.exit_status = EXIT_UNFIT

    def record_proven(self) -> None:
        """Put the worker back in service; only a success makes earlier faults not count."""
        self.fault = None

    def record_device_lost(self) -> None:
        """Note that the process can run no further job on its device, and has to end."""
        self.exit_status = EXIT_DEVICE_LOST

    def record_steps(
        self,
        mode: str,
        step_seconds: Sequence[float],
        shares: ActShares | None,
        attention: AttentionShares | None = None,
    ) -> None:
        """Add a job's denoising steps, and what was measured of activations and attention."""
        with self._lock:
            self._steps.setdefault(mode, deque(maxlen=KEPT)).extend(step_seconds)
            if shares is not None:
                self._shares[mode] = shares
            self._attention.pop(mode, None)
            if attention is not None:
                self._attention[mode] = attention

    @property
    def jobs_done(self) -> int:
        return self._done

    def modes(self) -> dict[str, ModeStatus]:
        """Return the measurements of each mode that has run."""
        with self._lock:
            return {mode: self._mode(mode) for mode in self._steps}

    def _mode(self, mode: str) -> ModeStatus:
        steps, shares = self._steps[mode], self._shares.get(mode)
        attention = self._attention.get(mode)
        return ModeStatus(
            step_s=statistics.median(steps) if steps else None,
            saturated_share=None if shares is None else shares.saturated,
            flushed_share=None if shares is None else shares.flushed,
            attention_density=None if attention is None else attention.density,
            attention_mass=None if attention is None else attention.mass,
        )
