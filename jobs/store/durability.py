"""Look whether Redis keeps what it has accepted, and wait until it has, if that is asked for.

The risks are in Redis' own settings, which an operator may not know: a policy that forgets jobs
once memory is short, no file on disk, or replicas that are behind when one of them takes over.
"""

import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, cast

from redis import Redis
from redis.exceptions import RedisError, ResponseError

from jobs import redis_keys
from jobs.errors import StoreUnavailable

logger = logging.getLogger(__name__)

LONGEST_WAIT_MS: Final = 2000
"""Both waits together stay below the answer timeout of `jobs.redis_client`."""

_AOF: Final = {"0": "no", "1": "yes"}


@dataclass(frozen=True, slots=True)
class Risk:
    """A setting of Redis by which it may lose accepted jobs; `setting` is a label of metrics."""

    setting: str
    detail: str


UNCHECKED: Final = "unchecked"
"""The label of a risk that is none: the settings cannot be read."""


@dataclass(frozen=True, slots=True)
class Durability:
    """What a new job has to reach before it is answered.

    Attributes:
        replicas: so many replicas have it in memory (WAIT).
        aof: it is on the disk of the primary (WAITAOF; Redis and Valkey from 7.2).
        wait_ms: how long to wait for each.
    """

    replicas: int = 0
    aof: bool = False
    wait_ms: int = 1000

    @property
    def is_asked_for(self) -> bool:
        """Whether anything is waited for."""
        return self.replicas > 0 or self.aof

    def confirm(self, redis: Redis, job_id: str) -> None:
        """Wait until a job that was just created is where it has to be.

        A write goes before the wait, on the same connection: what is waited for lies after the
        job's creation, whichever connection made it. And the job is looked up, because another
        server may have taken over meanwhile.

        Raises:
            StoreUnavailable: that is not certain in time; the job may still run.
        """
        if not self.is_asked_for:
            return
        with redis.pipeline(transaction=False) as pipe:
            pipe.exists(redis_keys.record(job_id))
            pipe.set(redis_keys.CONFIRMED, job_id)
            if self.replicas:
                pipe.wait(self.replicas, self.wait_ms)
            if self.aof:
                pipe.waitaof(1, 0, self.wait_ms)
            try:
                exists, _, *reached = pipe.execute(raise_on_error=False)
            except RedisError as error:
                raise self._unconfirmed(job_id, str(error)) from error
        if isinstance(exists, Exception) or not exists:
            raise self._unconfirmed(job_id, f"its record is not there: {exists}")
        if self.replicas and not _reaches(reached.pop(0), self.replicas):
            raise self._unconfirmed(job_id, f"{self.replicas} replicas do not have it yet")
        if self.aof and not _reaches(reached.pop(0), 1):
            raise self._unconfirmed(job_id, "it is not in the append-only file yet")

    def _unconfirmed(self, job_id: str, why: str) -> StoreUnavailable:
        logger.warning("job %s was created and is not confirmed: %s", job_id, why)
        return StoreUnavailable(
            f"Job {job_id} was created, and it is not certain that it would survive a fault of "
            f"Redis now. It may still run: look it up by its id, or send the same request with the "
            f"same Idempotency-Key again.",
            job_id=job_id,
        )


def _reaches(answer: object, number: int) -> bool:
    """Return whether WAIT or WAITAOF has counted enough servers; an error has counted none."""
    if isinstance(answer, Exception):
        logger.error("Redis does not wait: %s", answer)
        return False
    counted = answer[0] if isinstance(answer, list) else answer
    return cast("int", counted) >= number


def read_risks(redis: Redis, durability: Durability | None = None) -> tuple[Risk, ...]:
    """Read Redis' settings, and return those by which it may lose accepted jobs.

    Managed servers may refuse to tell them; then that is the only entry about them.
    """
    durability = durability or Durability()
    found = _settings(redis)
    return tuple(
        risk
        for risk in (
            _policy(found.get("maxmemory-policy")),
            _append_only(found.get("appendonly"), durability),
            _replicas(found.get("replicas"), durability),
            _unchecked(found),
        )
        if risk is not None
    )


def _settings(redis: Redis) -> Mapping[str, str]:
    """Read the settings from INFO, and what it does not tell by CONFIG GET."""
    found: dict[str, str] = {}
    with suppress(ResponseError):
        info = redis.info()
        told = {
            "maxmemory-policy": info.get("maxmemory_policy"),
            "appendonly": _AOF.get(str(info.get("aof_enabled"))),
            "replicas": info.get("connected_slaves"),
        }
        found |= {name: str(value) for name, value in told.items() if value is not None}
    for name in ("maxmemory-policy", "appendonly"):
        if name not in found:
            with suppress(ResponseError):
                answer = cast("dict[Any, Any]", redis.config_get(name))
                found |= {_text(key): _text(value) for key, value in answer.items()}
    return found


def _text(value: object) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _policy(policy: str | None) -> Risk | None:
    if policy in (None, "noeviction"):
        return None
    return Risk(
        "maxmemory-policy",
        f"Redis' maxmemory-policy is {policy}: once its memory is full, it forgets accepted jobs. "
        f"Set it to noeviction.",
    )


def _append_only(enabled: str | None, durability: Durability) -> Risk | None:
    if enabled != "no":
        return None
    waits = "; with REDIS_WAIT_AOF no job can be confirmed" if durability.aof else ""
    return Risk(
        "appendonly",
        f"Redis' appendonly is no: a restart loses the jobs that were accepted since the last "
        f"snapshot{waits}. Set it to yes.",
    )


def _replicas(connected: str | None, durability: Durability) -> Risk | None:
    if connected is None:
        return None
    if int(connected) < durability.replicas:
        return Risk(
            "replicas",
            f"Redis has {connected} replicas and REDIS_WAIT_REPLICAS is {durability.replicas}: no "
            f"job can be confirmed. Start replicas, or lower it.",
        )
    if int(connected) > 0 and durability.replicas == 0:
        return Risk(
            "replicas",
            f"Redis has {connected} replicas and REDIS_WAIT_REPLICAS is 0: a fail-over may lose "
            f"the jobs that were accepted last. Set it to 1 or more.",
        )
    return None


def _unchecked(found: Mapping[str, str]) -> Risk | None:
    missing = [name for name in ("maxmemory-policy", "appendonly") if name not in found]
    if not missing:
        return None
    return Risk(
        UNCHECKED,
        f"Redis does not tell its settings {' and '.join(missing)} (INFO and CONFIG GET): see for "
        f"yourself that it loses no accepted jobs.",
    )
