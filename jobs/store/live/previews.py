"""Keep the newest preview of each running job in Redis.

A preview is a small animated WebP of the video as the model predicts it so far. Each replaces the
one before, is announced by an event, and disappears when its attempt ends: the scripts delete it
with whatever takes the job out of the running state.
"""

from typing import Final, cast

from redis import Redis

from jobs import record, redis_keys
from jobs.errors import StaleAttempt
from jobs.record import Attempt
from jobs.store import scripts

MAX_PREVIEW_BYTES: Final = 20_000
"""The most bytes of a preview: every worker writes one into Redis every few seconds."""


class PreviewWriter:
    """Writes the previews of running jobs. Safe to share between threads."""

    def __init__(self, redis: Redis) -> None:
        self._write = scripts.load(redis, "preview")

    def write(self, attempt: Attempt, picture: bytes) -> None:
        """Replace the job's preview, and announce the new one.

        Args:
            picture: a WebP of at most MAX_PREVIEW_BYTES.

        Raises:
            StaleAttempt: the job has ended, is to be deleted, or a newer attempt owns it.
        """
        assert 0 < len(picture) <= MAX_PREVIEW_BYTES, f"a preview of {len(picture)} bytes"
        now = record.now().isoformat()
        answer = self._write(attempt.job_id, now, attempt.token, picture)
        if answer != b"ok":
            raise StaleAttempt(
                f"Attempt {attempt.number} may not show a preview of job {attempt.job_id}: the "
                f"record says {answer.decode()}.",
                job_id=attempt.job_id,
                attempt=attempt.number,
            )


def read_preview(redis: Redis, job_id: str) -> bytes | None:
    """Read the job's preview, a WebP; None while there is none."""
    return cast("bytes | None", redis.get(redis_keys.preview(job_id)))
