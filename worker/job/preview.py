"""Show what a running job looks like so far: encode previews and write them to Redis, in a thread.

The job's thread makes the pictures, which takes it next to nothing, and hands them over. If the one
before is still being encoded, a newer one replaces what waits. A preview never fails or delays a
job: after an error its job has no more of them.
"""

from __future__ import annotations

import contextvars
import logging
import subprocess
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Final

from redis.exceptions import RedisError

from jobs.errors import StaleAttempt
from jobs.record import Attempt
from jobs.store.live.previews import PreviewWriter
from worker.interface import PreviewClip, PreviewPace
from worker.job.pictures import reason
from worker.job.webp_animation import WebpEncoder
from worker.process.background import BackgroundThread

logger = logging.getLogger(__name__)

JOIN_TIMEOUT_S: Final = 1.0
"""How long the end of a job waits for the thread, which may hang in a call to Redis. What it writes
later is refused."""

MakeClip = Callable[[], PreviewClip]


class PreviewThread(BackgroundThread):
    """A context manager whose thread encodes and writes the previews of one attempt.

    `offer` belongs to the thread that runs the job.
    """

    def __init__(
        self,
        pace: PreviewPace,
        writer: PreviewWriter,
        attempt: Attempt,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare the thread.

        Args:
            clock: returns seconds that only grow.
        """
        super().__init__("preview", JOIN_TIMEOUT_S)
        self._pace = pace
        self._writer = writer
        self._attempt = attempt
        self._clock = clock
        self._is_on = True
        self._last: tuple[int, float] | None = None  # the step and time of the last preview
        self._pending: PreviewClip | None = None
        self._changed = threading.Condition()
        self._encoder = WebpEncoder()
        # The thread has none of the job's context variables (its id in log lines).
        self._job_variables = contextvars.copy_context()

    def offer(self, step: int, steps: int, make: MakeClip) -> None:
        """Make a preview after this step if one is due, and have the thread encode it.

        There is always one after the last step: decoding the video takes time, too.
        """
        if not self._is_on or not self._is_due(step, steps):
            return
        self._last = step, self._clock()
        try:
            clip = make()
        except Exception:
            # Whatever the device raises: if it is lost, the next step says so.
            logger.exception("the job has no more previews: making one failed")
            self._is_on = False
            return
        with self._changed:
            self._pending = clip
            self._changed.notify()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Drop what is not written yet: the job has ended."""
        self._encoder.close()
        with self._changed:
            self._done.set()
            self._changed.notify()
        super().__exit__(kind, error, trace)

    def _is_due(self, step: int, steps: int) -> bool:
        if self._last is None or step == steps:
            return True
        last_step, last_time = self._last
        is_step = step - last_step >= self._pace.every_steps
        return is_step and self._clock() - last_time >= self._pace.every_s

    def _run(self) -> None:
        self._job_variables.run(self._encode_and_write)

    def _encode_and_write(self) -> None:
        while (clip := self._next()) is not None:
            try:
                picture = self._encoder.encode(clip)
                if picture is None:
                    continue
                self._writer.write(self._attempt, picture)
            except RedisError:
                continue  # the lease's thread reports the outage, and the next preview may get in
            except StaleAttempt:
                break  # the job is no longer this attempt's, which the lease's thread finds, too
            except (OSError, subprocess.SubprocessError) as error:
                if not self._done.is_set():  # the end of a job kills its ffmpeg
                    logger.warning("the job has no more previews: %s", reason(error))
                break
            except Exception:
                # No error of a preview may end a job, nor the worker.
                logger.exception("the job has no more previews")
                break
        self._is_on = False

    def _next(self) -> PreviewClip | None:
        """Wait for the next clip; None once the job has ended."""
        with self._changed:
            while self._pending is None and not self._done.is_set():
                self._changed.wait()
            clip, self._pending = self._pending, None
            return None if self._done.is_set() else clip
