"""How a worker ends when it is told to: with its job, or without.

Signal handlers set plain attributes here. They run in the main thread between any two of its
instructions, so they must not wait for a lock that this very thread may hold.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Final

from worker.settings import DrainChoice

SAME_WISH_S: Final = 1.0
"""Two signals within this time are one wish: a terminal and a launcher may both send theirs."""


class Drain:
    """Whether this process was told to stop, and whether the job in hand is to be given back.

    Attributes:
        told: no further job is to be taken.
        give_back: the job in hand is not to be finished here.
    """

    def __init__(self, choice: DrainChoice = "finish") -> None:
        self.told = False
        self.give_back = False
        self._choice = choice
        self._told_at = 0.0

    def tell(self) -> None:
        """Have the worker stop: as it is configured to; told a second time, without its job."""
        now = time.monotonic()
        if not self.told:
            self._told_at = now
            self.give_back = self._choice == "requeue"
            self.told = True
        elif now - self._told_at >= SAME_WISH_S:
            self.give_back = True


@dataclass(slots=True)
class JobInHand:
    """The delivery that is being worked on.

    Attributes:
        stop: RQ's stop command wants it to end.
        not_ours: the job is queued again, or run by another, so RQ must not call it finished.
    """

    job_id: str
    stop: bool = False
    not_ours: bool = False
