"""Store the service's API keys in Redis.

A key has the form `wan_<id>_<secret>`. Its secret is shown once, when the key is made; Redis holds
its SHA-256. A fast, unsalted hash is right for these secrets, though it would be wrong for
passwords. A secret is 256 random bits, which cannot be guessed at any speed and which no two keys
share, so a slow hash or a salt would only add time to every request.

A key has a name and an owner, to whom the jobs belong that are requested with it. The owner is the
key's own name unless another one is given, so that a person may have several keys, or another key
in place of a lost one, and keep the jobs. A name is used only once, and a revoked key stays in the
list, because jobs may belong to it.
"""

import hashlib
import hmac
import logging
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any, Final, cast

from pydantic import AwareDatetime, BaseModel, ConfigDict, ValidationError
from redis import Redis
from redis.client import Pipeline

from jobs import redis_keys
from jobs.errors import InvalidSpec, KeyConflict, KeyNotFound, Violation
from jobs.record import now
from jobs.store.submission import OPEN_OWNER
from jobs.violations import outside, shown
from service.auth.rate_limit import RATE_BOUND, check_rate

logger = logging.getLogger(__name__)

NAME_BOUND: Final = "1 to 64 letters, digits, '.', '_' and '-', the first a letter or digit"
LONGEST_GRACE: Final = timedelta(days=30)
"""The longest time for which a replaced secret may stay valid."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_ID = re.compile(r"[0-9a-f]{12}")
_TOKEN = re.compile(r"wan_([0-9a-f]{12})_([0-9a-f]{64})")
_NOBODYS_SECRET: Final = "0" * 64


class Role(StrEnum):
    """The rights of a key.

    `ops` see and cancel everybody's jobs, and their own jobs go first. `rater` judges videos of
    blind comparisons, and may do nothing else.
    """

    USER = "user"
    OPS = "ops"
    RATER = "rater"


class ApiKey(BaseModel):
    """One key as Redis holds it.

    Attributes:
        quota: the most jobs its owner may have waiting and running; None for the service's default.
        rate: like "100/minute"; None for the service's default.
        owner: the owner of its jobs; None for its name.
        expires_at: when it stops working; None for never.
        old_secret_sha256: that of the secret before the last rotation, if it is still good.
        old_secret_until: until when that is.
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
    owner: str | None = None
    expires_at: AwareDatetime | None = None
    old_secret_sha256: str | None = None
    old_secret_until: AwareDatetime | None = None

    @property
    def owner_name(self) -> str:
        """The value of `JobRecord.owner` in the jobs that are requested with it."""
        return self.owner or self.name

    @property
    def is_usable(self) -> bool:
        """Whether it opens the service now: it is not revoked, and has not expired."""
        return self.revoked_at is None and not self.has_expired

    @property
    def manages(self) -> bool:
        """Whether it opens what is for operators, the other keys included."""
        return self.is_usable and self.role is Role.OPS

    @property
    def has_expired(self) -> bool:
        """Whether its time is over."""
        return self.expires_at is not None and self.expires_at <= now()

    def has_secret(self, secret_sha256: str) -> bool:
        """Return whether this is its secret's digest, or that of the one before, in its grace."""
        is_current = hmac.compare_digest(secret_sha256, self.secret_sha256)
        is_old = hmac.compare_digest(secret_sha256, self.old_secret_sha256 or "")
        return is_current or (is_old and self.has_old_secret)

    @property
    def has_old_secret(self) -> bool:
        """Whether the secret before the last rotation is still good."""
        return self.old_secret_until is not None and now() < self.old_secret_until


class KeyStore:
    """Reads and writes keys in Redis. Safe to share between threads; Redis errors are raised.

    Whoever changes keys over HTTP is named by `by`, the id of the key that was sent. Such a caller
    may neither revoke nor demote that key, nor leave the service without a usable key of the role
    ops: nobody could mend that over HTTP. Who has access to Redis (`by` is None) may.
    """

    def __init__(self, redis: Redis, by: str | None = None) -> None:
        self._redis = redis
        self._by = by

    def add(
        self,
        name: str,
        role: Role,
        quota: int | None = None,
        rate: str | None = None,
        *,
        owner: str | None = None,
        expires_at: datetime | None = None,
    ) -> tuple[ApiKey, str]:
        """Make a key. The second value is the key as text, to give to its owner; it is not stored.

        Raises:
            InvalidSpec: a name or a limit is out of bounds; all of them are in it.
            KeyConflict: the name is taken; or `by` has to make a key of the role ops first.
        """
        names = {"name": name} if owner is None else {"name": name, "owner": owner}
        _refuse([*_name_violations(names), *_limit_violations(quota, rate, expires_at)])
        secret = secrets.token_hex(32)
        made = ApiKey(
            id=secrets.token_hex(6),
            name=name,
            role=role,
            secret_sha256=digest(secret),
            created_at=now(),
            quota=quota,
            rate=rate,
            owner=None if owner == name else owner,
            expires_at=expires_at,
        )

        def add(pipe: Pipeline) -> None:
            known = _read_all(pipe)
            if owner is None and any(each.owner == name for each in known):
                raise KeyConflict(
                    f"There are keys whose jobs belong to {name}; take another name, or say with "
                    f"the owner {name} that this key is to see and get these jobs, too."
                )
            if any(each.name == name for each in known):
                raise KeyConflict(
                    f"There is already a key named {name}, in use or revoked; names are given "
                    f"once, because jobs belong to them. Take another name."
                )
            _keep_an_operator(known, None, made, self._by)
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
            KeyNotFound: there is no such key.
            KeyConflict: it is the key of `by`, or the last one of the role ops.
        """

        def revoked(key: ApiKey) -> ApiKey:
            return key.model_copy(update={"revoked_at": key.revoked_at or now()})

        return self._replace(name_or_id, revoked)

    def rotate(self, name_or_id: str, grace: timedelta = timedelta(0)) -> tuple[ApiKey, str]:
        """Replace a key's secret, for example after a leak; the owner keeps the name and the jobs.

        Args:
            grace: how long the secret that is replaced stays valid. One that was replaced earlier
                is void at once.

        Raises:
            InvalidSpec: the grace is out of bounds.
            KeyNotFound: there is no such key.
            KeyConflict: it was revoked.
        """
        if not timedelta(0) <= grace <= LONGEST_GRACE:
            _refuse([outside("grace", str(grace), f"from 0 to {LONGEST_GRACE.days} d")])
        secret = secrets.token_hex(32)

        def rotated(key: ApiKey) -> ApiKey:
            _refuse_revoked(key)
            old = {
                "old_secret_sha256": key.secret_sha256 if grace else None,
                "old_secret_until": now() + grace if grace else None,
            }
            return key.model_copy(update={"secret_sha256": digest(secret), **old})

        key = self._replace(name_or_id, rotated)
        return key, _token(key, secret)

    def change(self, name_or_id: str, **terms: Any) -> ApiKey:
        """Change some of a key's `role`, `quota`, `rate` and `expires_at`; the rest stays.

        Raises:
            InvalidSpec: a limit is out of bounds; all of them are in it.
            KeyNotFound: there is no such key.
            KeyConflict: it was revoked; or `by` would demote itself, or the last key of the role
                ops.
        """
        assert terms.keys() <= {"role", "quota", "rate", "expires_at"}, "the rest is for good"
        limits = (terms.get(name) for name in ("quota", "rate", "expires_at"))
        _refuse(list(_limit_violations(*limits)))

        def changed(key: ApiKey) -> ApiKey:
            _refuse_revoked(key)
            return key.model_copy(update=terms)

        return self._replace(name_or_id, changed)

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
            known = _read_all(pipe)
            found = [each for each in known if name_or_id in (each.id, each.name)]
            if not found:
                name = shown(name_or_id)
                raise KeyNotFound(f"There is no key with the name or id {name!r}.")
            written[:] = [change(found[0])]
            _keep_an_operator(known, found[0], written[0], self._by)
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
    sent = digest(secret)
    if key is None:
        hmac.compare_digest(sent, digest(_NOBODYS_SECRET))
        return False
    return key.has_secret(sent)


def _token(key: ApiKey, secret: str) -> str:
    return f"wan_{key.id}_{secret}"


def digest(secret: str) -> str:
    """Return the SHA-256 of a key's secret, as Redis holds it."""
    return hashlib.sha256(secret.encode()).hexdigest()


def _refuse_revoked(key: ApiKey) -> None:
    if key.revoked_at is not None:
        raise KeyConflict(f"The key of {key.name} was revoked, and that is for good.")


def _keep_an_operator(
    known: Sequence[ApiKey], before: ApiKey | None, after: ApiKey, by: str | None
) -> None:
    """Refuse a change over HTTP after which nobody could manage keys; see `KeyStore`."""
    if by is None or after.manages:
        return
    if before is None:
        if not any(key.manages for key in known):
            raise KeyConflict(
                "Make a key of the role ops first: with its first key this service is no longer "
                "open, and without one of the role ops nobody could manage keys any more."
            )
        return
    if not before.manages:
        return
    if by == before.id:
        raise KeyConflict(
            f"The key of {before.name} is the one that this request was sent with. Another key of "
            f"the role ops can do this, or `python -m service keys`."
        )
    if not any(key.manages for key in known if key.id != before.id):
        raise KeyConflict(
            f"The key of {before.name} is the last usable one of the role ops. Make another first, "
            f"or use `python -m service keys`."
        )


def _refuse(violations: Sequence[Violation]) -> None:
    if violations:
        raise InvalidSpec(violations)


def _name_violations(names: Mapping[str, str]) -> Iterator[Violation]:
    for field, name in names.items():
        if not _NAME.fullmatch(name):
            yield outside(field, name, NAME_BOUND)
        elif _ID.fullmatch(name) or name == OPEN_OWNER:
            detail = f"{field} {name} would be mistaken for something else; take another name."
            yield Violation(field, name, f"neither the id of a key nor {OPEN_OWNER}", detail)


def _limit_violations(
    quota: int | None, rate: str | None, expires_at: datetime | None
) -> Iterator[Violation]:
    if quota is not None and quota < 1:
        yield outside("quota", quota, "a whole number from 1")
    if rate is not None:
        try:
            check_rate(rate)
        except ValueError as error:
            yield Violation("rate", shown(rate), RATE_BOUND, f"{error}.")
    if expires_at is not None and expires_at <= now():
        moment = f"{expires_at:%Y-%m-%d %H:%M}Z"
        yield outside("expires", moment, "in the future", "to end a key now, revoke it")


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
