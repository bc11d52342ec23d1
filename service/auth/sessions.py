"""Store the sessions of callers who signed in with an API key or a rater's link, in a browser.

A session id is 256 random bits. It is in the caller's cookie only; Redis holds its SHA-256, for the
same reasons as that of a key's secret (`service/auth/api_keys.py`). A session is tied to its key's
id and secret, and has no rights of its own: what `Gate` knows of the key counts at each request. A
rater's seat (`service/auth/seats.py`) stands in for a key: its id, and the secret of its link.
"""

import hashlib
import hmac
import logging
import re
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from functools import lru_cache
from typing import Final, cast

from pydantic import AwareDatetime, BaseModel, ConfigDict, ValidationError
from redis import Redis
from redis.client import Pipeline

from jobs import redis_keys
from jobs.record import now
from service.auth.api_keys import ApiKey, digest
from service.auth.seats import NoSeats, Seat, SeatReader, split_id

logger = logging.getLogger(__name__)

MOST_SESSIONS: Final = 100
"""Sessions that one key may have; one more ends the oldest."""

MOST_SEATED: Final = 4096
"""Sessions of raters whose seats a process remembers."""

_ID = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class SessionToken:
    """A session id as a caller sent it. It is a secret, so `repr` leaves it out."""

    text: str = field(repr=False)

    @property
    def digest(self) -> str | None:
        """The SHA-256 under which the session is stored; None if this cannot be a session id."""
        if not _ID.fullmatch(self.text):
            return None
        return hashlib.sha256(self.text.encode()).hexdigest()


class Session(BaseModel):
    """One session as Redis holds it.

    Attributes:
        key_id: that of its key, or of its seat.
        secret_sha256: that of its key when the session was made; a rotated key has another one.
        ends_at: when it ends at the latest.
    """

    model_config = ConfigDict(frozen=True)

    key_id: str
    secret_sha256: str
    ends_at: AwareDatetime


class SessionStore:
    """Makes, reads and ends sessions. Safe to share between threads; Redis errors are raised."""

    def __init__(
        self,
        redis: Redis,
        seats: SeatReader | None = None,
        *,
        idle_s: float = redis_keys.SESSION_IDLE_S,
        longest_s: float = redis_keys.SESSION_LONGEST_S,
        renewed_every_s: float = redis_keys.SESSION_RENEWED_EVERY_S,
    ) -> None:
        """Create the store of one process; `seats` reads the seats that sessions of raters need."""
        self._redis = redis
        self.seats: SeatReader = NoSeats() if seats is None else seats
        # By digest: the seat that a session of a rater was found to belong to, newest last.
        self._seated: OrderedDict[str, tuple[str, str]] = OrderedDict()
        self._idle_ms = round(idle_s * 1000)
        self._longest = timedelta(seconds=longest_s)
        self._renewed_every_ms = round(renewed_every_s * 1000)

    def create(self, key_id: str, secret: str) -> SessionToken:
        """Make a session of a key or seat that `secret` has proved."""
        token = SessionToken(secrets.token_hex(32))
        assert token.digest is not None, "a new id has the form of one"
        session = Session(
            key_id=key_id, secret_sha256=digest(secret), ends_at=now() + self._longest
        )
        longest_ms = self._longest // timedelta(milliseconds=1)
        index = redis_keys.sessions_of(key_id)
        with self._redis.pipeline() as pipe:
            pipe.set(
                redis_keys.session(token.digest),
                session.model_dump_json(),
                px=min(self._idle_ms, longest_ms),
            )
            pipe.zremrangebyscore(index, "-inf", int(time.time() * 1000))
            pipe.zadd(index, {token.digest: int(session.ends_at.timestamp() * 1000)})
            pipe.pexpire(index, longest_ms)
            pipe.zrange(index, 0, -MOST_SESSIONS - 1)
            *_, too_many = pipe.execute()
        self._end(key_id, too_many)
        return token

    def read(self, token: SessionToken) -> Session | None:
        """Read a session and renew it; None if there is none, or it has ended."""
        if token.digest is None:
            return None
        with self._redis.pipeline(transaction=False) as pipe:
            _queue_session(pipe, token.digest)
            text, left_ms = pipe.execute()
        return self._renewed(token.digest, text, left_ms)

    def known_seat(self, token: SessionToken) -> tuple[str, str] | None:
        """Return the comparison and rater of a session that was read before and is a rater's."""
        return None if token.digest is None else self._seated.get(token.digest)

    def read_seated(
        self, token: SessionToken, queue_more: Callable[[Pipeline], None]
    ) -> tuple[Session | None, Seat | None, object]:
        """Read a session and its seat, which is known, and ask for one thing more in the same call.

        Returns the session, renewed, or None; the seat, or None; and the result of what
        `queue_more` put into the pipeline, an exception if it failed.
        """
        digest_, place = token.digest, self.known_seat(token)
        assert digest_ is not None, "the seat is known"
        assert place is not None, "the seat is known"
        with self._redis.pipeline(transaction=False) as pipe:
            _queue_session(pipe, digest_)
            self.seats.queue_seat(pipe, *place)
            queue_more(pipe)
            text, left_ms, found, more = pipe.execute(raise_on_error=False)
        for each in (text, left_ms, found):
            if isinstance(each, Exception):
                raise each
        return self._renewed(digest_, text, left_ms), self.seats.decode_seat(place[0], found), more

    def _renewed(self, digest_: str, text: bytes | None, left_ms: int) -> Session | None:
        session = _decode(text)
        longest_ms = 0
        if session is not None:
            longest_ms = (session.ends_at - now()) // timedelta(milliseconds=1)
        if session is None or longest_ms <= 0:
            self._seated.pop(digest_, None)
            return None
        if place := split_id(session.key_id):
            self._seated[digest_] = place
            if len(self._seated) > MOST_SEATED:
                self._seated.popitem(last=False)
        renewed_ms = min(self._idle_ms, longest_ms)
        if renewed_ms - left_ms > self._renewed_every_ms:
            # Does nothing if the session was ended meanwhile.
            self._redis.pexpire(redis_keys.session(digest_), renewed_ms)
        return session

    def end(self, token: SessionToken) -> None:
        """End a session; ending one that has ended changes nothing."""
        if token.digest is None:
            return
        text = cast("bytes | None", self._redis.getdel(redis_keys.session(token.digest)))
        session = _decode(text)
        if session is not None:
            self._redis.zrem(redis_keys.sessions_of(session.key_id), token.digest)

    def end_all(self, key_id: str) -> None:
        """End every session of a key."""
        found = self._redis.zrange(redis_keys.sessions_of(key_id), 0, -1)
        self._end(key_id, cast("list[bytes]", found))

    def _end(self, key_id: str, digests: list[bytes]) -> None:
        # By name, not the whole index: a session may have been made meanwhile.
        if digests:
            with self._redis.pipeline() as pipe:
                pipe.delete(*(redis_keys.session(each.decode()) for each in digests))
                pipe.zrem(redis_keys.sessions_of(key_id), *digests)
                pipe.execute()


def belongs(session: Session, key: ApiKey | None) -> bool:
    """Return whether a session was made with this key, and with a secret that is still good."""
    return key is not None and key.has_secret(session.secret_sha256)


def is_seated(session: Session, seat: Seat | None) -> bool:
    """Return whether a session was made with the link that this seat has now."""
    return seat is not None and hmac.compare_digest(session.secret_sha256, seat.secret_sha256)


def _queue_session(pipe: Pipeline, digest_: str) -> None:
    key = redis_keys.session(digest_)
    pipe.get(key)
    pipe.pttl(key)


_parsed = lru_cache(maxsize=1024)(Session.model_validate_json)


def _decode(text: bytes | None) -> Session | None:
    if text is None:
        return None
    try:
        return _parsed(text)
    except ValidationError as error:
        fields = error.errors(include_input=False, include_url=False)
        logger.error("A session cannot be read, so it is of no use: %s", fields)
        return None
