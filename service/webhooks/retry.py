"""When a call that failed is repeated."""

import random
import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from http import HTTPStatus

from jobs.store.webhook_outbox import Outcome
from service.webhooks.sender import Answer


@dataclass(frozen=True, slots=True)
class Schedule:
    """Pauses after the first, second, … failed try; after the last one the call is given up.

    A receiver may ask for a longer pause (Retry-After), of up to `longest_asked_s`.
    """

    pauses_s: tuple[float, ...] = (5, 30, 2 * 60, 10 * 60, 60 * 60, 6 * 60 * 60)
    jitter: float = 0.2
    longest_asked_s: float = 60 * 60

    def outcome(self, answer: Answer, tries_before: int) -> Outcome:
        """Judge what a try came to."""
        status = answer.status
        if status is not None and 200 <= status < 300:
            return Outcome(status)
        pause_s = None if status == HTTPStatus.GONE else self._pause_s(answer, tries_before)
        return Outcome(status, _error(answer), pause_s)

    def _pause_s(self, answer: Answer, tries_before: int) -> float | None:
        if tries_before >= len(self.pauses_s):
            return None
        # Spread, so that what failed together does not come back together.
        pause_s = self.pauses_s[tries_before] * random.uniform(1 - self.jitter, 1 + self.jitter)
        return max(pause_s, min(_asked_s(answer.retry_after), self.longest_asked_s))


def _error(answer: Answer) -> str:
    if answer.status is None:
        return answer.error or "no answer"
    if 300 <= answer.status < 400:
        return f"answered {answer.status}, and redirects are not followed"
    if answer.status == HTTPStatus.GONE:
        return "answered 410: it is gone, and not called again"
    return f"answered {answer.status}"


def _asked_s(retry_after: str | None) -> float:
    """Read Retry-After, seconds or a date; 0 for none and for what cannot be read."""
    if retry_after is None:
        return 0.0
    if retry_after.isascii() and retry_after.isdecimal():
        # Cut, because a number may be too long for a float.
        return float(retry_after[:9])
    try:
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0
