"""Authenticate callers by their API key or their session, and decide what they may do and see.

This module does not depend on HTTP. The service is open while only this machine can reach it and no
key was ever made (`service/auth/key_memory.py`); every caller is then `LOCAL`. Once a key was made
a key is required, on loopback too, even if that key is revoked.
"""

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from redis.exceptions import OutOfMemoryError

from jobs.errors import Forbidden, RateLimited, RecordUnreadable, Unauthenticated
from jobs.ids import not_found
from jobs.record import JobRecord
from jobs.store.job_store import JobStore
from jobs.store.submission import OPEN_OWNER
from service.auth.api_keys import ApiKey, KeyStore, Role, proves, split
from service.auth.key_memory import KeyMemory
from service.auth.rate_limit import RateLimiter
from service.auth.seats import Seat, opens, seat_id, split_id, split_link
from service.auth.sessions import Session, SessionStore, SessionToken, belongs, is_seated

logger = logging.getLogger(__name__)

Credential = str | SessionToken | None
"""Proves who sends a request: an API key, a session, or nothing."""

KEY_CACHED_S: Final = 2.0
"""How long a key is cached; a revoked key works at most this much longer."""
MAX_CACHED_KEYS: Final = 1024
USE_NOTED_EVERY_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class Principal:
    """An authenticated caller.

    Attributes:
        name: the owner of the jobs of this principal; unlike a key, it can be shown.
        quota: the most jobs it may have waiting and running; None for the default of its role.
        seat: the place of a rater who came by a link; None for callers with a key.
    """

    id: str
    name: str
    role: Role
    quota: int | None = None
    seat: Seat | None = None

    @property
    def sees_all(self) -> bool:
        """Whether it sees the jobs of all owners."""
        return self.role is Role.OPS

    @property
    def owner(self) -> str:
        """The value of `JobRecord.owner` in its jobs."""
        return self.name


LOCAL: Final = Principal(OPEN_OWNER, OPEN_OWNER, Role.OPS)
"""Every caller of a service that is open."""


class Gate:
    """Authenticates callers by their key or session. Safe to share between threads."""

    def __init__(
        self,
        keys: KeyStore,
        rates: RateLimiter,
        sessions: SessionStore,
        *,
        may_be_open: bool,
        memory: KeyMemory | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Create the gate of one process.

        Args:
            may_be_open: whether only this machine can reach the service.
            memory: says whether there were keys that Redis does not hold any more; None for a gate
                that believes Redis.
            clock: returns seconds that only grow.
        """
        self._keys = keys
        self._memory = memory
        self._rates = rates
        self._sessions = sessions
        self._may_be_open = may_be_open
        self._clock = clock
        self._open_until = 0.0
        # By key id: when it expires, and the key.
        self._cached: OrderedDict[str, tuple[float, ApiKey]] = OrderedDict()
        self._use_noted: dict[str, float] = {}  # by key id: when its use is noted again
        self._lock = threading.Lock()

    @property
    def is_open(self) -> bool:
        """Whether the service was open when Redis was last read, less than `KEY_CACHED_S` ago."""
        return self._clock() < self._open_until

    @property
    def is_locked(self) -> bool:
        """Whether it is known, without reading Redis, that every caller needs a key."""
        return not self._may_be_open

    def admit(self, credential: Credential) -> Principal:
        """Authenticate a caller and count one request.

        Args:
            credential: the key or session that was sent, if any.

        Raises:
            Unauthenticated: it is missing or unknown, its key was revoked, or the session ended.
            RateLimited: the key has used up its requests.
        """
        (answer,) = self.admit_all(credential, 1)
        if isinstance(answer, RateLimited):
            raise answer
        return answer

    def admit_all(self, credential: Credential, requests: int) -> Sequence[Principal | RateLimited]:
        """Authenticate a caller and count its requests; return a result for each.

        Raises:
            Unauthenticated: see `admit`.
        """
        session = None
        if isinstance(credential, SessionToken):
            # First: a rater is one on an open service, too.
            if self._sessions.known_seat(credential) is not None:
                return self._admit_known_seat(credential, requests)
            session = self._sessions.read(credential)
            if session is not None and (place := split_id(session.key_id)):
                seat = _seat_of(session, self._sessions.seats.seat(*place))
                return _seated(seat, self._rates.count_all(seat.id, None, requests))
        if self._is_open_now():
            return [LOCAL] * requests
        if credential is None:
            raise Unauthenticated(
                "This needs an API key; send it as `Authorization: Bearer wan_...`. The operators "
                "of this service make keys with `python -m service keys add NAME`."
            )
        if isinstance(credential, SessionToken):
            key = self._signed_in(session)
        else:
            key = self._proven(credential)
        refusals = self._rates.count_all(key.id, key.rate, requests)
        self._note_use(key.id)
        principal = Principal(key.id, key.owner_name, key.role, key.quota)
        return [principal if refusal is None else refusal for refusal in refusals]

    def _admit_known_seat(
        self, token: SessionToken, requests: int
    ) -> Sequence[Principal | RateLimited]:
        """Admit a rater whose seat is known, with one call to Redis.

        So a request is counted before it is sure that the session has not ended.
        """
        holder = seat_id(*(self._sessions.known_seat(token) or ("", "")))
        session, seat, counted = self._sessions.read_seated(
            token, lambda pipe: self._rates.queue(pipe, holder, requests)
        )
        if session is None:
            raise _ended()
        return _seated(_seat_of(session, seat), self._rates.queued(counted, holder, requests))

    def join(self, token: str, address: str) -> tuple[Seat, SessionToken]:
        """Exchange the token of a rater's link for a session.

        Args:
            address: the client's address, whose failed attempts are counted. Others are not: raters
                may share an address.

        Raises:
            Unauthenticated: the link is unknown, or was withdrawn.
            TooManySignIns: there were too many attempts.
        """
        parts = split_link(token)
        seat = None if parts is None else self._sessions.seats.seat(*parts[:2])
        if parts is None or seat is None or not opens(parts[2], seat):
            self._rates.count_sign_in(address, None)
            raise Unauthenticated(
                "The link is not one of this service, or it was withdrawn; ask those who sent it "
                "for a new one."
            )
        session = self._sessions.create(seat.id, parts[2])
        logger.info("A rater joined comparison %s from %s", seat.comparison_id, address)
        return seat, session

    def sign_in(self, token: str | None, address: str) -> tuple[Principal, SessionToken | None]:
        """Exchange a key for a session; an open service needs none, and makes none.

        Args:
            token: the key that was sent, if any.
            address: the client's address, whose attempts are counted.

        Raises:
            Unauthenticated, RateLimited: see `admit`.
            TooManySignIns: there were too many attempts.
        """
        if self._is_open_now():
            return LOCAL, None
        parts = split(token or "")
        self._rates.count_sign_in(address, parts and parts[0])
        principal = self.admit(token)
        assert parts is not None, "an admitted key has the form of one"
        session = self._sessions.create(*parts)
        logger.info("%s signed in from %s", principal.name, address)
        return principal, session

    def _is_open_now(self) -> bool:
        if not self._may_be_open:
            return False
        if self.is_open:
            return True
        if (self._memory is not None and self._memory.had_keys()) or self.any_key_was_made():
            # Permanently: a Redis that loses its keys later must not open the service again.
            self._may_be_open = False
            self._open_until = 0.0
            return False
        self._open_until = self._clock() + KEY_CACHED_S
        return True

    def any_key_was_made(self) -> bool:
        """Return whether Redis holds a key, even a revoked one, and remember it if it does."""
        was_made = self._keys.any_was_made()
        if was_made and self._memory is not None:
            self._memory.note()
        return was_made

    def _proven(self, token: str) -> ApiKey:
        parts = split(token)
        if parts is not None:
            key_id, secret = parts
            key = self._cached_key(key_id)
            if not proves(secret, key):
                # The key may have been made or rotated since it was cached.
                key = self._read_again(key_id)
            if proves(secret, key) and key is not None and key.revoked_at is None:
                return _in_time(key)
        # The same message in all these cases, so that guessing reveals nothing.
        raise Unauthenticated("The API key is not one of this service, or it was revoked.")

    def _signed_in(self, session: Session | None) -> ApiKey:
        """Return the key of a session; a session ends with the secret that it was made with."""
        if session is not None:
            key = self._cached_key(session.key_id)
            if not belongs(session, key):
                # The key may have been rotated since it was cached, or is not cached.
                key = self._read_again(session.key_id)
            if belongs(session, key) and key is not None and key.revoked_at is None:
                return _in_time(key)
        raise _ended()

    def _cached_key(self, key_id: str) -> ApiKey | None:
        with self._lock:
            until, key = self._cached.get(key_id, (0.0, None))
        return key if self._clock() < until else None

    def _read_again(self, key_id: str) -> ApiKey | None:
        until = self._clock() + KEY_CACHED_S
        key = self._keys.get(key_id)
        if key is not None and self._memory is not None:
            self._memory.note()
        with self._lock:
            self._cached.pop(key_id, None)
            if key is not None:
                self._cached[key_id] = (until, key)
                if len(self._cached) > MAX_CACHED_KEYS:
                    self._cached.popitem(last=False)
        return key

    def _note_use(self, key_id: str) -> None:
        now = self._clock()
        if now < self._use_noted.get(key_id, 0.0):
            return
        self._use_noted[key_id] = now + USE_NOTED_EVERY_S
        with suppress(OutOfMemoryError):  # no reason to fail the request
            self._keys.note_use(key_id)


def _in_time(key: ApiKey) -> ApiKey:
    """Return a key that the caller has proved; raise Unauthenticated if its time is over."""
    if key.has_expired:
        raise Unauthenticated(
            f"The API key expired at {key.expires_at:%Y-%m-%d %H:%M} UTC; ask the operators of "
            f"this service to extend it (`python -m service keys change`), or for another one."
        )
    return key


def visible_job(store: JobStore, principal: Principal, job_id: str) -> JobRecord:
    """Read a job that the principal may see.

    Raises:
        JobNotFound: there is none, or it is somebody else's; callers cannot see which.
        RecordUnreadable: see `jobs.record.decode`; the message says how to delete the job.
    """
    try:
        job = store.get(job_id)
    except RecordUnreadable as error:
        if not _may_see(principal, error.context.get("owner")):
            raise not_found(job_id) from error
        detail = f"{error.detail} `DELETE /v1/videos/{job_id}` deletes it."
        raise RecordUnreadable(detail, **error.context) from error
    if not _may_see(principal, job.owner):
        raise not_found(job_id)
    return job


def _may_see(principal: Principal, owner: object) -> bool:
    return principal.sees_all or owner == principal.owner


def listed_owner(principal: Principal, wanted: str | None) -> str | None:
    """Return the owner whose jobs to list; None for all owners.

    Args:
        wanted: the owner that the caller asks for, if any.

    Raises:
        Forbidden: the caller asks for another owner's jobs, and is not ops.
    """
    if principal.sees_all:
        return wanted
    if wanted not in (None, principal.owner):
        raise Forbidden(
            f"Only keys of the role ops list the jobs of others; leave owner out, or set it to "
            f"{principal.owner}."
        )
    return principal.owner


def _ended() -> Unauthenticated:
    return Unauthenticated(
        "The session is unknown or has ended; sign in again by `POST /session` with an API key."
    )


def _seat_of(session: Session, seat: Seat | None) -> Seat:
    """Return the seat of a rater's session; raise Unauthenticated if it was withdrawn."""
    if seat is None or not is_seated(session, seat):
        raise Unauthenticated(
            "The link that this session came from was withdrawn, or its comparison deleted; ask "
            "those who sent it for a new one."
        )
    return seat


def _seated(
    seat: Seat, refusals: Sequence[RateLimited | None]
) -> Sequence[Principal | RateLimited]:
    principal = Principal(seat.id, seat.name, Role.RATER, seat=seat)
    return [principal if refusal is None else refusal for refusal in refusals]


def refuse_raters(principal: Principal) -> Principal:
    """Return the principal, but raise Forbidden if its role is rater."""
    if principal.role is Role.RATER:
        raise Forbidden(
            "Raters judge videos at /rating, and may do nothing else; use a key of another role."
        )
    return principal


def require_ops(principal: Principal) -> Principal:
    """Return the principal if its role is ops, else raise Forbidden."""
    if principal.role is not Role.OPS:
        raise Forbidden(f"This is for keys of the role ops; this key's role is {principal.role}.")
    return principal
