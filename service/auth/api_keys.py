"""Store the service's API keys in Redis.

A key has the form `wan_<id>_<secret>`. Its secret is shown once, when the key is made; Redis holds
its SHA-256. A fast, unsalted hash is right for these secrets, though it would be wrong for
passwords. A secret is 256 random bits, which cannot be guessed at any speed and which no two keys
share, so a slow hash or a salt would only add time to every request.

A key's name is used only once, because it owns the jobs that were requested with the key. So a
revoked key stays in the list.
"""

import hashlib
import hmac
import logging
import re
import secrets
from collections.abc import Callable
from datetime import datetime
from enum import StrEnum
from typing import Any, Final, cast

from pydantic import AwareDatetime, BaseModel, ConfigDict, ValidationError
from redis import Redis
from redis.client import Pipeline

from jobs import redis_keys
from jobs.record import now
from jobs.store.submission import OPEN_OWNER
from service.auth.rate_limit import check_rate

logger = logging.getLogger(__name__)

NAME_BOUND: Final = "1 to 64 letters, digits, '.', '_' and '-', the first a letter or digit"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_ID = re.compile(r"[0-9a-f]{12}")
_TOKEN = re.compile(r"wan_([0-9a-f]{12})_([0-9a-f]{64})")
_NOBODYS_SECRET: Final = "0" * 64


class Role(StrEnum):
    """The rights of a key: `ops` see and cancel everybody's jobs, and their own jobs go first."""

    USER = "user"
    OPS = "ops"


class KeyRefused(Exception):
    """A key cannot be made, rotated or revoked as asked; the message says why."""


class ApiKey(BaseModel):
    """One key as Redis holds it.

    Attributes:
        quota: the most jobs its owner may have waiting and running; None for the service's default.
        rate: like "100/minute"; None for the service's default.
    """

    model_config = ConfigDict(frozen=True)

    id: str
    name: str
    role: Role
    secret_sha256: str
    created_at: AwareDatetime
    revoked_at: AwareDatetime | None = None
    quota: int | None = None
    rate: str | None = None


class KeyStore:
    """Reads and writes keys in Redis. Safe to share between threads; Redis errors are raised."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    def add(
        self, name: str, role: Role, quota: int | None = None, rate: str | None = None
    ) -> tuple[ApiKey, str]:
        """Make a key. The second value is the key as text, to give to its owner; it is not stored.

        Raises:
            KeyRefused: the name is taken or invalid, or a limit is out of bounds.
        """
        _check(name, quota, rate)
        secret = secrets.token_hex(32)
        made = ApiKey(
            id=secrets.token_hex(6),
            name=name,
            role=role,
            secret_sha256=digest(secret),
            created_at=now(),
            quota=quota,
            rate=rate,
        )

        def add(pipe: Pipeline) -> None:
            if any(each.name == name for each in _read_all(pipe)):
                raise KeyRefused(
                    f"there is already a key named {name}, in use or revoked; names are given "
                    f"once, because jobs belong to them. Take another name."
                )
            _write(pipe, made)

        self._change(add)
        return made, _token(made, secret)

    def all(self) -> list[ApiKey]:
        """Read every key, the revoked ones too, oldest first."""
        return sorted(_read_all(self._redis), key=lambda each: each.created_at)

    def get(self, key_id: str) -> ApiKey | None:
        """Read a key by its id; None if there is none, or it cannot be parsed."""
        return _decode(key_id, cast("bytes | None", self._redis.hget(redis_keys.API_KEYS, key_id)))

    def any_was_made(self) -> bool:
        """Return whether there is a key, even a revoked one."""
        return bool(self._redis.exists(redis_keys.API_KEYS))

    def revoke(self, name_or_id: str) -> ApiKey:
        """Revoke a key for ever. Revoking a revoked key changes nothing.

        Raises:
            KeyRefused: there is no such key.
        """

        def revoked(key: ApiKey) -> ApiKey:
            return key.model_copy(update={"revoked_at": key.revoked_at or now()})

        return self._replace(name_or_id, revoked)

    def rotate(self, name_or_id: str) -> tuple[ApiKey, str]:
        """Replace a key's secret, for example after a leak; the owner keeps the name and the jobs.

        Raises:
            KeyRefused: there is no such key, or it was revoked.
        """
        secret = secrets.token_hex(32)

        def rotated(key: ApiKey) -> ApiKey:
            if key.revoked_at is not None:
                raise KeyRefused(f"the key of {key.name} was revoked, and that is for good.")
            return key.model_copy(update={"secret_sha256": digest(secret)})

        key = self._replace(name_or_id, rotated)
        return key, _token(key, secret)

    def note_use(self, key_id: str) -> None:
        """Record that the key was used now."""
        self._redis.hset(redis_keys.API_KEYS_USED, key_id, now().isoformat(timespec="seconds"))

    def last_uses(self) -> dict[str, datetime]:
        """Read when each key was last used, by key id."""
        found = cast("dict[bytes, bytes]", self._redis.hgetall(redis_keys.API_KEYS_USED))
        return {key.decode(): datetime.fromisoformat(at.decode()) for key, at in found.items()}

    def _replace(self, name_or_id: str, change: Callable[[ApiKey], ApiKey]) -> ApiKey:
        written: list[ApiKey] = []

        def replace(pipe: Pipeline) -> None:
            found = [each for each in _read_all(pipe) if name_or_id in (each.id, each.name)]
            if not found:
                raise KeyRefused(f"there is no key with the name or id {name_or_id!r}.")
            written[:] = [change(found[0])]
            _write(pipe, written[0])

        self._change(replace)
        return written[0]

    def _change(self, change: Callable[[Pipeline], None]) -> None:
        """Read and write keys in one transaction, repeated if another client wrote meanwhile."""
        self._redis.transaction(change, redis_keys.API_KEYS)


def split(token: str) -> tuple[str, str] | None:
    """Split a key into id and secret; None if it does not have the form of a key."""
    found = _TOKEN.fullmatch(token)
    return (found[1], found[2]) if found else None


def proves(secret: str, key: ApiKey | None) -> bool:
    """Return whether `secret` is the key's. Takes as long if there is no such key."""
    expected = digest(_NOBODYS_SECRET) if key is None else key.secret_sha256
    same = hmac.compare_digest(digest(secret), expected)
    return same and key is not None


def _token(key: ApiKey, secret: str) -> str:
    return f"wan_{key.id}_{secret}"


def digest(secret: str) -> str:
    """Return the SHA-256 of a key's secret, as Redis holds it."""
    return hashlib.sha256(secret.encode()).hexdigest()


def _check(name: str, quota: int | None, rate: str | None) -> None:
    if not _NAME.fullmatch(name):
        raise KeyRefused(f"{name!r} is not a name for a key; take {NAME_BOUND}.")
    if _ID.fullmatch(name) or name == OPEN_OWNER:
        raise KeyRefused(f"{name!r} would be mistaken for something else; take another name.")
    if quota is not None and quota < 1:
        raise KeyRefused(f"the quota is {quota}, which is not a whole number from 1.")
    if rate is not None:
        try:
            check_rate(rate)
        except ValueError as error:
            raise KeyRefused(f"{error}.") from error


def _read_all(redis: Redis) -> list[ApiKey]:
    found = cast("dict[bytes, bytes]", redis.hgetall(redis_keys.API_KEYS))
    decoded = (_decode(key_id.decode(), text) for key_id, text in found.items())
    return [key for key in decoded if key is not None]


def _decode(key_id: str, text: bytes | None) -> ApiKey | None:
    """Parse one key. One that cannot be parsed admits nobody, and does not hide other keys."""
    if text is None:
        return None
    try:
        return ApiKey.model_validate_json(text)
    except ValidationError as error:
        fields = error.errors(include_input=False, include_url=False)
        logger.error("API key %s cannot be read, so it is of no use: %s", key_id, fields)
        return None


def _write(pipe: Pipeline, key: ApiKey) -> None:
    pipe.multi()
    pipe.hset(redis_keys.API_KEYS, key.id, cast("Any", key.model_dump_json()))
