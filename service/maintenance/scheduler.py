"""Run background tasks in every service process, each in a thread of its own.

Any number of processes may run. A task that only one of them should do takes a lock in Redis
itself.
"""

import logging
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from redis.exceptions import RedisError

from jobs.errors import ArtifactsUnavailable

logger = logging.getLogger(__name__)

Work = Callable[[threading.Event], object]
"""One round of a task. Work that takes long checks the event, and ends early once it is set."""

FIRST_RETRY_S: Final = 5.0
LAST_RETRY_S: Final = 10.0
"""After a round that failed the pause begins at `FIRST_RETRY_S`, or the task's own if that is
shorter, and doubles with every failure. It grows to `LAST_RETRY_S`, or the task's own pause if that
is longer. So a task of every few seconds runs within `LAST_RETRY_S` once Redis is back."""

JOIN_S: Final = 2.0
"""How long the end of the process waits for rounds under way. The threads are daemons, so they end
with the process anyway, and every round may be interrupted anywhere."""


@dataclass(frozen=True, slots=True)
class Task:
    """Work that is repeated every `every_s` seconds, the first time at once."""

    name: str
    every_s: float
    work: Work


class Scheduler:
    """Runs its tasks from `start` to `stop`; no error in a round ends a task."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self._tasks = tuple(tasks)
        self._ending = threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Start a thread for each task."""
        for task in self._tasks:
            thread = threading.Thread(
                target=self._repeat, args=(task,), name=f"scheduler-{task.name}", daemon=True
            )
            thread.start()
            self._threads.append(thread)

    def stop(self) -> None:
        """End all tasks, and wait up to `JOIN_S` for rounds under way."""
        self._ending.set()
        deadline = time.monotonic() + JOIN_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _repeat(self, task: Task) -> None:
        failures = 0
        fault: str | None = None
        while not self._ending.is_set():
            found = self._run_once(task, fault)
            failures = 0 if found is None else failures + 1
            fault = found
            self._ending.wait(_pause_s(task.every_s, failures))

    def _run_once(self, task: Task, before: str | None) -> str | None:
        """Run one round and return the name of its error; None if it had none.

        It logs only if that differs from `before`, the error of the round before.
        """
        try:
            task.work(self._ending)
        except Exception as error:
            # Every error is caught, because a task that had ended for good would be noticed only
            # weeks later. Redis and the artifact store are expected to be down at times; any other
            # error is logged with a traceback.
            fault = type(error).__name__
            if fault != before and not self._ending.is_set():
                expected = isinstance(error, (RedisError, ArtifactsUnavailable))
                logger.warning(
                    "%s fails, and is tried again: %s: %s",
                    task.name,
                    fault,
                    error,
                    exc_info=None if expected else error,
                )
            return fault
        if before is not None:
            logger.info("%s works again", task.name)
        return None


def _pause_s(every_s: float, failures: int) -> float:
    """Return the seconds to the next round, spread so that processes do not all run at once."""
    pause_s = every_s
    if failures:
        first = min(every_s, FIRST_RETRY_S)
        pause_s = min(max(every_s, LAST_RETRY_S), first * 2.0 ** min(failures - 1, 16))
    return pause_s * random.uniform(0.9, 1.1)
