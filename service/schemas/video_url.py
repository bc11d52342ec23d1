"""Video links that open without a key, for a while.

A link carries the second it expires and an HMAC-SHA256 of that second and the video's path, so it
opens this one video, for reading, and nothing else. Every service process signs with the same
secret: the configured one, or one that the first process leaves in Redis.
"""

import hashlib
import hmac
import math
import re
import secrets
import time
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlencode

from pydantic import SecretStr
from redis import Redis

from jobs import redis_keys
from jobs.errors import LinkRefused
from service.schemas.expiry import Keep

SECRET_READ_EVERY_S: Final = 10.0
"""How long processes may disagree after Redis has lost the secret and another one was made."""
STABLE_FOR_S: Final = 60
"""Links to one video are the same for this long, so that whoever polls a job sees it unchanged."""

_EXPIRES = re.compile(r"[0-9]{1,12}", re.ASCII)


class LinkSigner:
    """Signs paths and checks signatures. Safe to share between threads."""

    def __init__(self, redis: Redis, secret: SecretStr | None, ttl_s: int) -> None:
        self._redis = redis
        self._configured = None if secret is None else secret.get_secret_value().encode()
        self._ttl_s = ttl_s
        self._found: tuple[float, bytes] | None = None

    def sign(self, path: str, now: float | None = None) -> str:
        """Return `path` with its expiry, at least the time to live away, and its signature."""
        second = time.time() if now is None else now
        grid_s = min(STABLE_FOR_S, self._ttl_s)
        expires = str(math.ceil((second + self._ttl_s) / grid_s) * grid_s)
        query = urlencode({"expires": expires, "signature": self._signature(path, expires)})
        return f"{path}?{query}"

    def check(self, path: str, expires: str, signature: str) -> None:
        """Let a sound link pass.

        Raises:
            LinkRefused: it was altered, is another path's, or has expired.
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
        # The path begins with a slash and the second holds none, so no two pairs read the same.
        message = f"{expires}{path}".encode(errors="replace")
        return hmac.new(self._secret(), message, hashlib.sha256).hexdigest()

    def _secret(self) -> bytes:
        if self._configured is not None:
            return self._configured
        if self._found is None or time.monotonic() >= self._found[0]:
            # Read first: a full Redis still answers, but takes no SET, be it one of nothing.
            secret = self._redis.get(redis_keys.URL_SECRET)
            if secret is None:
                # The first process to ask makes it; the others' SET changes nothing.
                self._redis.set(redis_keys.URL_SECRET, secrets.token_hex(32), nx=True)
                secret = self._redis.get(redis_keys.URL_SECRET)
            assert isinstance(secret, bytes), "the connection gives bytes, and the key never ends"
            self._found = (time.monotonic() + SECRET_READ_EVERY_S, secret)
        return self._found[1]


@dataclass(frozen=True, slots=True)
class VideoLinks:
    """Absolute, signed addresses of videos, as one caller reaches the service, and their time."""

    base_url: str
    signer: LinkSigner
    keep: Keep

    def to(self, job_id: str) -> str:
        return self.base_url + self.signer.sign(video_path(job_id))


def video_path(job_id: str) -> str:
    return f"/jobs/{job_id}/video.mp4"
