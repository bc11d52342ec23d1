"""Sign and check links that give access to a video's file without a key for a limited time.

A link contains the Unix second at which it expires and an HMAC-SHA256 of that second and the
file's path. So it is valid for reading this one video or picture only. All service processes sign
with the same secret: the configured one, or one that the first process stores in Redis.
"""

import hashlib
import hmac
import math
import re
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final
from urllib.parse import urlencode

from pydantic import SecretStr
from redis import Redis

from jobs import redis_keys
from jobs.errors import LinkRefused
from service.schemas.expiry import RetentionPeriods

SECRET_READ_EVERY_S: Final = 10.0
"""How often a process reads the secret in Redis again.

If Redis loses the secret, the next process that reads it makes another. For so long, processes may
then sign with different secrets."""
STABLE_FOR_S: Final = 60
"""How long the link to a video stays the same, so that polling a job gives equal answers."""

_EXPIRES = re.compile(r"[0-9]{1,12}", re.ASCII)


class VideoFile(StrEnum):
    """The files of a video. Their values are OpenAI's variants of its content."""

    VIDEO = "video"
    THUMBNAIL = "thumbnail"
    SPRITESHEET = "spritesheet"

    @property
    def suffix(self) -> str:
        """The ending of its name."""
        return ".mp4" if self is VideoFile.VIDEO else ".webp"


class LinkSigner:
    """Signs paths and checks signatures. Safe to share between threads."""

    def __init__(
        self,
        redis: Redis,
        secret: SecretStr | None,
        ttl_s: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Create the signer of one process.

        Args:
            secret: the configured secret; None to use the one in Redis.
            ttl_s: how long a link is valid, in seconds.
            clock: returns seconds that only grow; the secret in Redis is read again by it.
        """
        self._redis = redis
        self._configured = None if secret is None else secret.get_secret_value().encode()
        self._ttl_s = ttl_s
        self._clock = clock
        self._cached: tuple[float, bytes] | None = None  # when it is read again, and the secret

    def sign(self, path: str, now: float | None = None) -> str:
        """Return `path` with its expiry, at least `ttl_s` from now, and its signature."""
        now_s = time.time() if now is None else now
        grid_s = min(STABLE_FOR_S, self._ttl_s)
        expires = str(math.ceil((now_s + self._ttl_s) / grid_s) * grid_s)
        query = urlencode({"expires": expires, "signature": self._signature(path, expires)})
        return f"{path}?{query}"

    def check(self, path: str, expires: str, signature: str) -> None:
        """Check a link.

        Raises:
            LinkRefused: it was altered, belongs to another path, or has expired.
        """
        # Compared as bytes: text that is not ASCII is refused by `compare_digest`.
        expected = self._signature(path, expires).encode()
        genuine = hmac.compare_digest(signature.encode(errors="replace"), expected)
        if not (genuine and _EXPIRES.fullmatch(expires)):
            raise LinkRefused(
                "The link's signature does not fit it: the link was altered or cut, or the secret "
                "it was signed with has changed. Read the job again for a new one."
            )
        if int(expires) < time.time():
            raise LinkRefused("The link has expired. Read the job again for a new one.")

    def _signature(self, path: str, expires: str) -> str:
        # No two pairs give the same message: the path begins with a slash, and an expiry that is
        # accepted contains none.
        message = f"{expires}{path}".encode(errors="replace")
        return hmac.new(self._secret(), message, hashlib.sha256).hexdigest()

    def _secret(self) -> bytes:
        if self._configured is not None:
            return self._configured
        if self._cached is None or self._clock() >= self._cached[0]:
            # Read first: a full Redis still answers GET, but refuses SET, even if it would change
            # nothing.
            secret = self._redis.get(redis_keys.URL_SECRET)
            if secret is None:
                # The first process creates the secret; with NX, the SET of others changes nothing.
                self._redis.set(redis_keys.URL_SECRET, secrets.token_hex(32), nx=True)
                secret = self._redis.get(redis_keys.URL_SECRET)
            assert isinstance(secret, bytes), "replies are bytes, and the key does not expire"
            self._cached = (self._clock() + SECRET_READ_EVERY_S, secret)
        return self._cached[1]


@dataclass(frozen=True, slots=True)
class VideoLinks:
    """Makes absolute, signed URLs of videos and their pictures for one caller.

    Attributes:
        base_url: the URL under which the caller reaches the service.
        retention_periods: decide until when a video is kept.
    """

    base_url: str
    signer: LinkSigner
    retention_periods: RetentionPeriods

    def to(self, job_id: str, file: VideoFile = VideoFile.VIDEO) -> str:
        """Return the signed URL of a job's video, or of a picture of it."""
        return self.base_url + self.signer.sign(video_path(job_id, file))

    def to_preview(self, job_id: str, number: int) -> str:
        """Return the URL of a job's newest preview. It is not signed: it needs a key."""
        return f"{self.base_url}/jobs/{job_id}/preview.webp?number={number}"


def video_path(job_id: str, file: VideoFile = VideoFile.VIDEO) -> str:
    """Return the path of the route that sends a job's video, or a picture of it."""
    return f"/jobs/{job_id}/{file}{file.suffix}"
