"""API keys in Redis: who may use the service, and as what.

A key reads `wan_<id>_<secret>`. Its secret is shown once, when the key is made; Redis holds its
SHA-256. One fast, unsalted hash is right for these secrets, as it would be wrong for passwords: 256
random bits cannot be guessed at any speed, and no two keys share them, so a slow hash or a salt
would add nothing but time to every request.

A key's name is for ever: it owns the jobs that were asked for with it, so it is given only once,
and a revoked key stays listed.
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
    """`ops` see and cancel everybody's jobs, and their own go first."""

    USER = "user"
    OPS = "ops"


class KeyRefused(Exception):
    """A key cannot be made or revoked as asked; the sentence says why."""


class ApiKey(BaseModel):
    """One key as Redis holds it.

    Attributes:
        quota: the most jobs its owner may have waiting and running; None for the service's own.
        rate: like "100/minute"; None for the service's own.
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
    """All access to keys. Safe to share between threads; Redis errors pass through."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    def add(
        self, name: str, role: Role, quota: int | None = None, rate: str | None = None
    ) -> tuple[ApiKey, str]:
        """Make a key. The second value is the key to give away; it is kept nowhere.

        Raises:
            KeyRefused: the name is taken or is none, or a limit is out of bounds.
        """
        _check(name, quota, rate)
        secret = secrets.token_hex(32)
        made = ApiKey(
            id=secrets.token_hex(6),
            name=name,
            role=role,
            secret_sha256=_digest(secret),
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
        return _decode(key_id, cast("bytes | None", self._redis.hget(redis_keys.API_KEYS, key_id)))

    def any_was_made(self) -> bool:
        """Say whether there is a key, be it revoked."""
        return bool(self._redis.exists(redis_keys.API_KEYS))

    def revoke(self, name_or_id: str) -> ApiKey:
        """Make a key useless for good. Revoking a revoked one changes nothing.

        Raises:
            KeyRefused: there is no such key.
        """

        def revoked(key: ApiKey) -> ApiKey:
            return key.model_copy(update={"revoked_at": key.revoked_at or now()})

        return self._replace(name_or_id, revoked)

    def rotate(self, name_or_id: str) -> tuple[ApiKey, str]:
        """Give a key another secret, for one that leaked: its owner keeps name and jobs.

        Raises:
            KeyRefused: there is no such key, or it was revoked.
        """
        secret = secrets.token_hex(32)

        def rotated(key: ApiKey) -> ApiKey:
            if key.revoked_at is not None:
                raise KeyRefused(f"the key of {key.name} was revoked, and that is for good.")
            return key.model_copy(update={"secret_sha256": _digest(secret)})

        key = self._replace(name_or_id, rotated)
        return key, _token(key, secret)

    def note_use(self, key_id: str) -> None:
        """Remember that the key was used now."""
        self._redis.hset(redis_keys.API_KEYS_USED, key_id, now().isoformat(timespec="seconds"))

    def last_uses(self) -> dict[str, datetime]:
        """Read when keys were last used, by their ids."""
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
        """Read and write the keys as one, again from the start if somebody else wrote meanwhile."""
        self._redis.transaction(change, redis_keys.API_KEYS)


def split(token: str) -> tuple[str, str] | None:
    """Take a key apart into id and secret; None for what cannot be one."""
    found = _TOKEN.fullmatch(token)
    return (found[1], found[2]) if found else None


def proves(secret: str, key: ApiKey | None) -> bool:
    """Say whether `secret` is the key's. Takes as long where there is no such key."""
    expected = _digest(_NOBODYS_SECRET) if key is None else key.secret_sha256
    same = hmac.compare_digest(_digest(secret), expected)
    return same and key is not None


def _token(key: ApiKey, secret: str) -> str:
    return f"wan_{key.id}_{secret}"


def _digest(secret: str) -> str:
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
            raise KeyRefused(f"the rate is {error}.") from error


def _read_all(redis: Redis) -> list[ApiKey]:
    found = cast("dict[bytes, bytes]", redis.hgetall(redis_keys.API_KEYS))
    decoded = (_decode(key_id.decode(), text) for key_id, text in found.items())
    return [key for key in decoded if key is not None]


def _decode(key_id: str, text: bytes | None) -> ApiKey | None:
    """Read one key. What cannot be read opens no door, and hides no other key."""
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
