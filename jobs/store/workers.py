"""Publish and read what workers say of themselves, and order single workers to take no jobs.

A status expires with its worker's offer (`jobs/catalog.py`). An order to drain is a key of its own,
which the service writes and the worker follows and renews. So it lives as long as the worker does,
and ends with it. The worker keeps a copy: if Redis loses the order, or was away for longer than the
order lives, the worker writes it again. To resume is therefore an order, too, and not the absence
of one.
"""

from collections.abc import Sequence
from typing import Literal, cast

from pydantic import AwareDatetime, Field, ValidationError
from redis import Redis

from jobs import redis_keys
from jobs.catalog import ModeName, Published, WorkerOffer, readable
from jobs.errors import WorkerNotFound
from jobs.record import now
from jobs.redis_client import server_time_s
from jobs.violations import shown

WorkerStateName = Literal["idle", "busy", "draining", "drained", "degraded"]


class ModeStatus(Published):
    """The measurements of a worker in one mode; None for a value that was not measured yet.

    The shares are of the inputs of the quantized layers, in one sampled step of the latest job:
    `saturated_share` lies beyond the format's range, `flushed_share` is not zero but too small.

    Density and mass are of sparse self-attention in the latest job, on average over the steps and
    blocks in which it was sparse; on several devices, of the first one's heads.
    """

    step_s: float | None = Field(default=None, description="Median of the latest denoising steps.")
    saturated_share: float | None = Field(default=None, ge=0, le=1)
    flushed_share: float | None = Field(default=None, ge=0, le=1)
    attention_density: float | None = Field(
        default=None, ge=0, le=1, description="The share of scores that sparse attention computed."
    )
    attention_mass: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="The share of the softmax that these scores hold, measured on a few queries.",
    )


class WorkerStatus(Published):
    """The status of one live worker, for operators; requests are never checked against it.

    Memory is the device's, and None on a CPU. A worker that is `draining` finishes its current job
    first and takes no other, because it was told to stop or to drain. A `drained` one waits for the
    order to resume. One that is `degraded` takes no job until it has proven that it can end one;
    `fault` says in a sentence what is wrong with it. `withheld` is the offer of a worker in one of
    these three states, which is not in the catalog.
    """

    worker_id: str = Field(min_length=1)
    state: WorkerStateName
    fault: str | None = None
    job_id: str | None = None
    jobs_done: int = Field(default=0, ge=0, description="Jobs that ended with a video.")
    memory_allocated_bytes: int | None = Field(default=None, ge=0)
    memory_peak_bytes: int | None = Field(default=None, ge=0)
    memory_total_bytes: int | None = Field(default=None, ge=0)
    modes: dict[ModeName, ModeStatus] = Field(default_factory=dict)
    withheld: WorkerOffer | None = None

    @property
    def takes_jobs(self) -> bool:
        """Whether the worker takes jobs, and so has an offer in the catalog."""
        return self.state in ("idle", "busy")


class DrainOrder(Published):
    """An operator's order to one worker: to take no jobs (`drained`), or to take them again."""

    drained: bool
    by: str = Field(description="Who gave it: the owner of a key.")
    at: AwareDatetime


def publish_status(redis: Redis, status: WorkerStatus) -> None:
    """Make `status` readable for the next 15 seconds, also for a worker without an offer."""
    second = server_time_s(redis)
    with redis.pipeline(transaction=True) as pipe:
        key = redis_keys.worker_status(status.worker_id)
        # Without what is None, so that a service of before a field was added reads the rest.
        text = status.model_dump_json(exclude_none=True)
        pipe.set(key, text, ex=redis_keys.OFFER_TTL_S)
        pipe.zadd(redis_keys.WORKERS, {status.worker_id: second})
        pipe.execute()


def read_statuses(redis: Redis) -> tuple[WorkerStatus, ...]:
    """Read the statuses of workers that are live or finish their last job, sorted by id."""
    found = cast("list[bytes]", redis.zrange(redis_keys.WORKERS, 0, -1))
    names = sorted(name.decode(errors="replace") for name in found)
    keys = [redis_keys.worker_status(name) for name in names]
    return readable(redis, WorkerStatus, "status", names, keys)


def order(redis: Redis, worker_id: str, by: str, *, drained: bool) -> DrainOrder:
    """Order a live worker to take no more jobs, or to take jobs again; it obeys in a second or two.

    Raises:
        WorkerNotFound: no worker publishes an offer or a status under this id.
    """
    live = (redis_keys.worker_status(worker_id), redis_keys.worker_offer(worker_id))
    if not redis.exists(*live):
        raise not_found(worker_id)
    given = DrainOrder(drained=drained, by=by, at=now())
    redis.set(
        redis_keys.worker_drain(worker_id), given.model_dump_json(), ex=redis_keys.DRAIN_TTL_S
    )
    return given


def not_found(worker_id: str) -> WorkerNotFound:
    """Build the error for an id of no live worker."""
    return WorkerNotFound(
        f"There is no live worker {shown(worker_id)}; `GET /workers` lists them. A worker that "
        f"starts again has another id."
    )


def read_orders(redis: Redis, worker_ids: Sequence[str]) -> dict[str, DrainOrder]:
    """Read the orders to drain, by the id of the worker that is to follow them."""
    keys = [redis_keys.worker_drain(name) for name in worker_ids]
    texts = cast("list[bytes | None]", redis.mget(keys)) if keys else []
    orders = {name: _decode(text) for name, text in zip(worker_ids, texts, strict=True)}
    return {name: each for name, each in orders.items() if each is not None and each.drained}


def follow_order(redis: Redis, worker_id: str, known: DrainOrder | None) -> DrainOrder | None:
    """Return the order that a worker is under, and renew it; None while it is to take jobs.

    Args:
        known: the order that the worker was under until now.
    """
    key = redis_keys.worker_drain(worker_id)
    text = cast("bytes | None", redis.getex(key, ex=redis_keys.DRAIN_TTL_S))
    found = _decode(text)
    if found is None:
        # Lost, or never given. NX: an operator may give one at this moment.
        if known is not None:
            redis.set(key, known.model_dump_json(), ex=redis_keys.DRAIN_TTL_S, nx=text is None)
        return known
    return found if found.drained else None


def _decode(text: bytes | None) -> DrainOrder | None:
    if text is None:
        return None
    try:
        return DrainOrder.model_validate_json(text, extra="ignore")
    except ValidationError:
        return None  # of another version, or written by hand: nothing that could be obeyed
