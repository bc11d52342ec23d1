"""Find abandoned jobs and put them back into their queues.

A job is abandoned in two cases. A worker is killed, hangs or loses its host while it runs the job:
the lease in the record expires. Or a worker dies after it took the id out of the queue and before
it claimed the job: the record says queued, and no queue contains the id. Every worker and every
service process looks for such jobs every few seconds. The scripts decide atomically, so any number
of processes may do so at the same time.
"""

import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Final, cast

from redis import Redis
from redis.exceptions import ResponseError
from rq import Queue

from jobs import record, redis_keys
from jobs.errors import WorkerLost, WorkerUnfit
from jobs.record import Failure
from jobs.redis_client import is_transient
from jobs.state import JobState
from jobs.store import rq_entry, scripts
from jobs.store.rq_entry import RqFields
from jobs.telemetry import job_spans
from jobs.telemetry.job_spans import TracedAttempt
from jobs.telemetry.tracing import Attributes, TraceContext

logger = logging.getLogger(__name__)

INTERVAL_S: Final = 3.0
"""How often each process looks for abandoned jobs."""

MISSING_S: Final = 6.0
"""A queued job counts as missing after this long in no queue.

A worker needs some milliseconds to claim what it took. A worker that was stopped for longer finds
the job held by another one, and leaves it.
"""

SCAN_EVERY_S: Final = 60.0
"""How often a process compares all queued jobs with the queues, though there are as many of the one
as of the other. With 10,000 jobs that takes a tenth of a second of its time."""

GAP_S: Final = 9.0
"""If no process has looked for this long, Redis was unreachable, also for the holders of leases."""

GRACE_S: Final = 6.0
"""After such a gap, leases are not judged for this long: workers renew within two or three s."""

MAX_LOST: Final = 2
"""A job that lost this many attempts (the worker crashed, hung or was killed) is failed."""

MAX_RETURNED: Final = 5
"""A job that this many attempts returned, because their worker was at fault, is failed. More than
MAX_LOST: such a worker does not die of the job, and takes no other until it has proven itself."""

WORKER_LOST: Final = Failure(
    code=WorkerLost.code,
    detail=f"The worker was lost {MAX_LOST} times while it ran this job, so the job was given up. "
    "Send it again; if that fails, too, the request itself may be what ends the worker, and its "
    "log has the reason.",
)


class Recovery:
    """Finds abandoned jobs and puts them back. Safe to share between threads.

    A record that this version cannot read is put back like any other: the worker that takes it
    fails it for that reason. A record that even the scripts cannot handle is logged once and then
    skipped.
    """

    def __init__(self, redis: Redis, scan_every_s: float = SCAN_EVERY_S) -> None:
        self._redis = redis
        self._look = scripts.load(redis, "look")
        self._put_back = scripts.load(redis, "put_back")
        self._redeliver = scripts.load(redis, "redeliver")
        self._unrecoverable: set[str] = set()
        self._scan_every_s = scan_every_s
        self._scan_at = -float("inf")

    def run(self) -> dict[str, str]:
        """Look once; return the new state of each job that was put back or ended, by its id."""
        new_states: dict[str, str] = {}
        for job_id in self._with_expired_lease():
            self._recover(job_id, self._end_attempt, new_states)
        for job_id in self._missing():
            self._recover(job_id, self._redeliver_missing, new_states)
        return new_states

    def _recover(
        self,
        job_id: str,
        action: Callable[[str, RqFields], str | None],
        new_states: dict[str, str],
    ) -> None:
        """Recover one job with `action`; an error in its record must not stop the others."""
        try:
            rq_fields = rq_entry.rq_fields_again(self._redis, job_id)
            state = None if rq_fields is None else action(job_id, rq_fields)
        except ResponseError as error:
            if is_transient(error):
                raise
            # Logged once, and not every few seconds until the record expires.
            if job_id not in self._unrecoverable:
                self._unrecoverable.add(job_id)
                logger.error("cannot look after job %s: %s", job_id, error)
            return
        if state is not None:
            new_states[job_id] = state

    def _end_attempt(self, job_id: str, rq_fields: RqFields) -> str | None:
        lost = self._attempt_of(job_id)
        answer: bytes = self._put_back(
            job_id, record.now().isoformat(), "", *lost_attempt_args(), *rq_fields
        )
        if answer not in (b"queued", b"failed", b"cancelled"):
            return None
        state = answer.decode()
        logger.warning(
            "job %s was abandoned by %s and is now %s",
            job_id,
            lost.get("worker", "?"),
            state,
        )
        _send_span(job_id, lost)
        return state

    def _attempt_of(self, job_id: str) -> dict[str, str]:
        """Read what the record says of the running attempt; its end removes most of it."""
        values = self._redis.hmget(redis_keys.record(job_id), _OF_ATTEMPT)
        known = zip(_OF_ATTEMPT, cast("list[bytes | None]", values), strict=True)
        return {name: text.decode(errors="replace") for name, text in known if text is not None}

    def _redeliver_missing(self, job_id: str, rq_fields: RqFields) -> str | None:
        if not self._redeliver(job_id, int(MISSING_S * 1000), *rq_fields):
            return None
        logger.warning("job %s was in no queue and is put back into its own", job_id)
        return "queued"

    def _with_expired_lease(self) -> Iterable[str]:
        """Find the running jobs whose lease has expired."""
        clock_ms, may_judge = self._look(int(GAP_S * 1000), int(GRACE_S * 1000))
        running = self._ids(JobState.RUNNING)
        if not may_judge or not running:
            return []
        leases = self._fields(running, "lease_ms")
        # None: the job has ended since, or its record has expired.
        return [name for name, ms in leases.items() if ms is not None and _has_passed(ms, clock_ms)]

    def _missing(self) -> Iterable[str]:
        """Find the queued jobs that are in no queue at this moment.

        As many ids in the queues as jobs that are queued mean that there is none, but for an id
        that is in a queue by mistake and hides one; so now and then all are looked at.
        """
        if time.monotonic() < self._scan_at and self._counts_agree():
            return []
        self._scan_at = time.monotonic() + self._scan_every_s
        waiting = self._fields(self._ids(JobState.QUEUED), "queue")
        in_queues: set[str] = set()
        for queue in {
            name.decode(errors="replace") for name in waiting.values() if name is not None
        }:
            key = Queue(queue, connection=self._redis).key
            in_queues.update(
                cast("bytes", each).decode() for each in self._redis.lrange(key, 0, -1)
            )
        return [
            name for name, queue in waiting.items() if queue is not None and name not in in_queues
        ]

    def _counts_agree(self) -> bool:
        """Return whether as many jobs are queued as the queues have ids."""
        queues = cast("set[bytes]", self._redis.smembers(Queue.redis_queues_keys))
        with self._redis.pipeline(transaction=True) as pipe:
            pipe.zcard(redis_keys.index(JobState.QUEUED))
            for key in queues:
                pipe.llen(key)
            queued, *lengths = pipe.execute()
        return bool(queued == sum(lengths))

    def _fields(self, job_ids: list[str], field: str) -> dict[str, bytes | None]:
        """Read one field of many records, in one round trip."""
        with self._redis.pipeline(transaction=False) as pipe:
            for job_id in job_ids:
                pipe.hget(redis_keys.record(job_id), field)
            return dict(zip(job_ids, pipe.execute(), strict=True))

    def _ids(self, state: JobState) -> list[str]:
        found = self._redis.zrange(redis_keys.index(state.value), 0, -1)
        return [cast("bytes", each).decode() for each in found]


def _has_passed(lease_ms: bytes, clock_ms: int) -> bool:
    """Return whether a lease has expired; a malformed one counts, and the script reports it.

    One that ends later than any that is given now is from before the clock was set back. Its holder
    would have renewed it.
    """
    return not lease_ms.isdigit() or not 0 < int(lease_ms) - clock_ms <= redis_keys.LEASE_S * 1000


_OF_ATTEMPT: Final = [
    *("worker", "attempts", "started_ms", "progress"),
    *("queue", "shape", "traceparent", "tracestate"),
]


def _send_span(job_id: str, lost: Mapping[str, str]) -> None:
    """Send the span of an attempt that was lost, which its worker cannot do."""
    number, started_ms = lost.get("attempts", ""), lost.get("started_ms", "")
    if not (number.isdigit() and started_ms.isdigit()):
        return
    traceparent = lost.get("traceparent")
    context = traceparent and TraceContext(traceparent, lost.get("tracestate", ""))
    traced = TracedAttempt(
        job_id=job_id,
        number=int(number),
        queue=lost.get("queue", "?"),
        worker=lost.get("worker", "?"),
        shape=lost.get("shape", "?"),
        context=context or None,
    )
    job_spans.lost(traced, int(started_ms) * 1_000_000, _progress(lost.get("progress")))


def _progress(written: str | None) -> Attributes:
    """Return how far an attempt had come, as attributes of its span."""
    try:
        progress = json.loads(written or "{}")
        return {f"wan.last_{name}": progress[name] for name in ("stage", "step", "steps")}
    except (ValueError, TypeError, KeyError):
        return {}


AttemptArgs = tuple[str, int, str, str]
"""Arguments of `jobs/store/lua/put_back.lua`: as what an attempt counts, the limit, the failure
beyond it and that failure's code."""

NOT_COUNTED: Final[AttemptArgs] = ("", 0, "", "")


def lost_attempt_args() -> AttemptArgs:
    """Count an attempt that was lost with its worker."""
    return "lost", MAX_LOST, WORKER_LOST.model_dump_json(), WORKER_LOST.code


def returned_attempt_args(reason: str) -> AttemptArgs:
    """Count an attempt that a worker gave back for a reason of its own, which is a sentence."""
    failure = Failure(
        code=WorkerUnfit.code,
        detail=f"Workers gave this job back {MAX_RETURNED} times, each for a fault of its own, so "
        f"it was given up. The latest: {reason} Once that is mended, send it again.",
    )
    return "returned", MAX_RETURNED, failure.model_dump_json(), failure.code
