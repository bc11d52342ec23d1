"""Use an artifact store only while it is the one that belongs to this Redis.

A share that is not mounted looks like an empty folder, and a wrong bucket like an empty bucket. A
video that is written there is lost, and videos that are missing there seem to be deleted. So a
store carries a marker with an id, and Redis knows that id. A store without it, or with another one,
counts as missing: it is not read, nothing is deleted from it, and a put waits for the right one.
"""

import contextlib
import json
import logging
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, cast

from redis import Redis
from redis.exceptions import RedisError

from jobs import redis_keys
from jobs.artifacts.keys import MARKER, StoredArtifact
from jobs.artifacts.retry import PutFailed
from jobs.artifacts.store import MarkedStore, open_artifacts
from jobs.errors import ArtifactsUnavailable

logger = logging.getLogger(__name__)

CHECKED_S: Final = 5.0
"""How long reads rely on the last look at the marker. What changes the store looks every time, and
so does a read that finds nothing. Signing a URL, which reads nothing, relies on it for as long as
it found the right store."""

ASK_S: Final = 0.3
"""How long a put waits for Redis, which may hang, to say which store it knows."""

LOCK_S: Final = 60.0
"""How long the first look of a process may hold up those of others."""

LATEST: Final = 20
"""So many of the latest videos are looked for in a store that has no marker yet."""

_ID = re.compile(rb"[0-9a-f]{32}\n?")
_UNREADABLE: Final = b"unreadable"


class KnownArtifactStore:
    """An `ArtifactStore` that raises ArtifactsUnavailable while its store is missing.

    Safe to share between threads.
    """

    def __init__(
        self, store: MarkedStore, redis: Redis, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._store = store
        self._redis = redis
        self._clock = clock
        self._last_known: bytes | None = None
        self._relied_on_until = -float("inf")
        self.is_present: bool | None = None
        """Whether the last look found the right store; None before the first."""

    def verify(self) -> None:
        """Look whether this is the store that Redis knows; the first store ever becomes it.

        Raises:
            ArtifactsUnavailable: it is missing, or does not respond.
            RedisError: Redis does not say which store it knows, and never did to this process.
        """
        self._compare(self._known_id)

    def _compare(self, ask: Callable[[], bytes | None]) -> None:
        try:
            found, known = self._marker(), ask()
            if known is None:
                known, found = self._introduce()
            elif found != known:
                found = self._marker()  # another process may have written it between the two looks
            if found != known:
                raise _missing(f"{_described(found)}, and Redis knows {known.decode()}")
        except ArtifactsUnavailable:
            self._relied_on_until, self.is_present = -float("inf"), False
            raise
        self._relied_on_until, self.is_present = self._clock() + CHECKED_S, True

    def adopt(self) -> str:
        """Make this store the one that Redis knows, whatever Redis knew; return its id.

        For an operator who has moved or restored a store.
        """
        found = self._marker()
        if found in (None, _UNREADABLE):
            self._store.write_marker(_new_marker(), replace=found is not None)
            found = self._marker()
        if found is None:
            raise _forgetful()
        self._redis.set(redis_keys.ARTIFACTS_ID, found)
        self.verify()
        return found.decode()

    def latest_videos(self) -> tuple[int, int]:
        """Return how many of the latest videos on record are in the store, and of how many."""
        keys = _latest_keys(self._redis)
        return sum(self._store.size(key) is not None for key in keys), len(keys)

    def probe(self) -> None:
        self._store.probe()  # first, as it can say more about what does not respond
        self.verify()

    def put(self, key: str, source: Path, check: Callable[[], None] | None = None) -> None:
        def guard() -> None:
            try:
                self._compare(self._known_id_soon)
            except ArtifactsUnavailable as error:
                missing = "missing" in error.context
                reason = f"the artifact store {'is missing' if missing else 'does not respond'}"
                raise PutFailed(reason, transient=True, missing=missing) from error
            except RedisError as error:
                reason = "Redis does not say which artifact store it knows"
                raise PutFailed(reason, transient=True) from error

        self._store.put(key, source, check, guard)

    def size(self, key: str) -> int | None:
        self._verify_now_and_then()
        found = self._store.size(key)
        if found is None:
            self.verify()
            found = self._store.size(key)  # it may have come back between the two
        return found

    def read(self, key: str, start: int, end: int) -> Iterator[bytes]:
        self._verify_now_and_then()
        yield from self._store.read(key, start, end)

    def signed_url(self, key: str, method: str, valid_s: int) -> str | None:
        # Signing asks nothing of the store, so a slow one must not hold it up: what the last look
        # found counts, however long ago. The service looks every few seconds of its own accord.
        if not self.is_present:
            self.verify()
        return self._store.signed_url(key, method, valid_s)

    def delete(self, key: str) -> None:
        self.verify()
        self._store.delete(key)

    def list(self, prefix: str = "") -> Iterator[StoredArtifact]:
        self.verify()
        yield from self._store.list(prefix)
        self.verify()  # or what went missing meanwhile would look deleted

    def remove_leftovers(self) -> int:
        self.verify()
        return self._store.remove_leftovers()

    def _verify_now_and_then(self) -> None:
        if self._clock() >= self._relied_on_until:
            self.verify()

    def _marker(self) -> bytes | None:
        found = self._store.marker()
        if found is None:
            return None
        return found.strip() if _ID.fullmatch(found) else _UNREADABLE

    def _known_id(self) -> bytes | None:
        try:
            self._last_known = cast("bytes | None", self._redis.get(redis_keys.ARTIFACTS_ID))
        except RedisError:
            # A video must not be lost because Redis is away for a moment.
            if self._last_known is None:
                raise
        return self._last_known

    def _known_id_soon(self) -> bytes | None:
        """Ask Redis, but go on with its last answer after `ASK_S`: no job must wait for Redis."""
        if self._last_known is None:
            return self._known_id()
        # An error leaves the last answer, too.
        asking = threading.Thread(target=self._known_id, name="store-id", daemon=True)
        asking.start()
        asking.join(ASK_S)
        return self._last_known

    def _introduce(self) -> tuple[bytes, bytes | None]:
        """Let Redis know this store, if it still knows none; return the id it knows, and ours."""
        with self._redis.lock(redis_keys.ARTIFACTS_LOCK, timeout=LOCK_S, blocking_timeout=LOCK_S):
            found = self._marker()
            if found is None and self._known_id() is None:
                self._refuse_a_store_without_its_videos()
                self._store.write_marker(_new_marker(), replace=False)
                found = self._marker()
            if found is _UNREADABLE:
                raise _missing(_described(found))
            if found is not None and self._redis.set(redis_keys.ARTIFACTS_ID, found, nx=True):
                logger.info("this Redis knows the artifact store %s from now on", found.decode())
            known = self._known_id()
        if known is None:
            raise _forgetful()
        return known, found

    def _refuse_a_store_without_its_videos(self) -> None:
        """Raise if Redis knows videos and none of the latest is there: the share is not mounted."""
        found, number = self.latest_videos()
        if number and not found:
            raise _missing(f"has no marker and none of the {number} latest videos")


def open_known_artifacts(url: str, redis: Redis) -> KnownArtifactStore:
    """Open the store at `url`, to be used while it is the one that `redis` knows.

    Neither is asked before the first use. Raises what `open_artifacts` raises.
    """
    return KnownArtifactStore(open_artifacts(url), redis)


def _new_marker() -> bytes:
    return uuid.uuid4().hex.encode() + b"\n"


def _described(found: bytes | None) -> str:
    if found is None:
        return "has no marker"
    if found is _UNREADABLE:
        return f"has a marker, {MARKER}, without an id"
    return f"is the store {found.decode()}"


def _missing(what: str) -> ArtifactsUnavailable:
    return ArtifactsUnavailable(
        f"The artifact store is missing: what is at ARTIFACTS_URL {what}. Mount the store or "
        f"correct ARTIFACTS_URL; if it was moved on purpose, run `python -m service store adopt`.",
        missing=True,
    )


def _forgetful() -> ArtifactsUnavailable:
    return ArtifactsUnavailable(
        "The artifact store took its marker and does not have it: it loses what is written."
    )


def _latest_keys(redis: Redis) -> list[str]:
    """Read the keys of the latest videos that were not deleted, newest first."""
    names = cast(
        "list[bytes]",
        redis.zrevrangebylex(redis_keys.index("succeeded"), "+", "-", start=0, num=LATEST),
    )
    with redis.pipeline(transaction=False) as pipe:
        for name in names:
            pipe.hmget(redis_keys.record(name.decode()), "video", "video_deleted_at")
        found: list[list[bytes | None]] = pipe.execute()
    keys = []
    for video, deleted in found:
        # A record that another version wrote says nothing about the store.
        with contextlib.suppress(ValueError, KeyError, TypeError):
            keys += [str(json.loads(video)["key"])] if video and not deleted else []
    return keys
