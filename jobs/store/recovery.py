"""Jobs that nobody works on although somebody should: found, and put back.

Two ways lead there. A worker is killed, hangs or loses its machine while it runs a job: the lease
in the record runs out. Or it dies between taking the id out of the queue and claiming the job: the
record says queued and no queue holds it. Every worker and every service process looks every few
seconds; the scripts decide, so it does not matter how many look at the same time.
"""

import logging
from collections.abc import Callable, Iterable
from typing import Final, cast

from redis import Redis
from redis.exceptions import OutOfMemoryError, ReadOnlyError, ResponseError
from rq import Queue

from jobs import record, redis_keys
from jobs.errors import WorkerLost
from jobs.record import Failure
from jobs.state import JobState
from jobs.store import rq_entry, scripts
from jobs.store.rq_entry import RqFields

logger = logging.getLogger(__name__)

EVERY_S: Final = 3.0
"""How often to look."""

MISSING_S: Final = 6.0
"""A queued job counts as missing after this long in no queue. A worker needs some milliseconds to
claim what it took; one that was stopped for longer finds the job held, and leaves it."""


GAP_S: Final = 9.0
"""When nobody has looked for this long, Redis was away, and so were the holders of leases."""

GRACE_S: Final = 6.0
"""How long after such a gap no lease is judged. A worker renews within two or three seconds."""


class Recovery:
    """Finds what was abandoned and puts it back. Safe to share between threads.

    A record that this version cannot read is put back like any other: the worker that gets it ends
    it with that reason. One that not even the scripts can handle is named once, and then skipped.
    """

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._look = scripts.load(redis, "look")
        self._put_back = scripts.load(redis, "put_back")
        self._redeliver = scripts.load(redis, "redeliver")
        self._beyond_help: set[str] = set()

    def run(self) -> dict[str, str]:
        """Look once; returns what became of each job that was put back or given up, by its id."""
        done: dict[str, str] = {}
        for job_id in self._without_lease():
            self._helped(job_id, self._end_attempt, done)
        for job_id in self._missing():
            self._helped(job_id, self._deliver, done)
        return done

    def _helped(
        self, job_id: str, mend: Callable[[str, RqFields], str | None], done: dict[str, str]
    ) -> None:
        """Do what is to be done for one job; a broken record must not keep the others waiting."""
        try:
            rq_fields = rq_entry.rq_fields_again(self._redis, job_id)
            state = None if rq_fields is None else mend(job_id, rq_fields)
        except (ReadOnlyError, OutOfMemoryError):
            raise
        except ResponseError as error:
            # Once, and not every few seconds until the record lapses.
            if job_id not in self._beyond_help:
                self._beyond_help.add(job_id)
                logger.error("cannot look after job %s: %s", job_id, error)
            return
        if state is not None:
            done[job_id] = state

    def _end_attempt(self, job_id: str, rq_fields: RqFields) -> str | None:
        worker = cast("bytes | None", self._redis.hget(redis_keys.record(job_id), "worker")) or b"?"
        answer: bytes = self._put_back(
            job_id, record.now().isoformat(), "", 1, *when_lost(), *rq_fields
        )
        if answer not in (b"queued", b"failed", b"cancelled"):
            return None
        state = answer.decode()
        logger.warning(
            "job %s was abandoned by %s and is now %s",
            job_id,
            worker.decode(errors="replace"),
            state,
        )
        return state

    def _deliver(self, job_id: str, rq_fields: RqFields) -> str | None:
        if not self._redeliver(job_id, int(MISSING_S * 1000), *rq_fields):
            return None
        logger.warning("job %s was in no queue and is put back into its own", job_id)
        return "queued"

    def _without_lease(self) -> Iterable[str]:
        """The running jobs whose lease has run out, as far as this process can tell."""
        clock_ms, judged = self._look(int(GAP_S * 1000), int(GRACE_S * 1000))
        running = self._ids(JobState.RUNNING)
        if not judged or not running:
            return []
        leases = self._fields(running, "lease_ms")
        # None: it has ended since, or its record has lapsed.
        return [name for name, ms in leases.items() if ms is not None and _has_passed(ms, clock_ms)]

    def _missing(self) -> Iterable[str]:
        """The queued jobs that are in no queue at this moment."""
        waiting = self._fields(self._ids(JobState.QUEUED), "queue")
        held: set[str] = set()
        for queue in {
            name.decode(errors="replace") for name in waiting.values() if name is not None
        }:
            key = Queue(queue, connection=self._redis).key
            held.update(cast("bytes", each).decode() for each in self._redis.lrange(key, 0, -1))
        return [name for name, queue in waiting.items() if queue is not None and name not in held]

    def _fields(self, job_ids: list[str], field: str) -> dict[str, bytes | None]:
        """One field of many records, in one exchange."""
        with self._redis.pipeline(transaction=False) as pipe:
            for job_id in job_ids:
                pipe.hget(redis_keys.record(job_id), field)
            return dict(zip(job_ids, pipe.execute(), strict=True))

    def _ids(self, state: JobState) -> list[str]:
        found = self._redis.zrange(redis_keys.index(state.value), 0, -1)
        return [cast("bytes", each).decode() for each in found]


def _has_passed(lease_ms: bytes, clock_ms: int) -> bool:
    """Whether a lease has run out; what is none counts as one, and the script names the record."""
    return not lease_ms.isdigit() or int(lease_ms) <= clock_ms


MAX_LOST: Final = 2
"""A job whose attempts vanished this often (its worker crashed, hung or was killed) is failed."""

WORKER_LOST = Failure(
    code=WorkerLost.code,
    detail=f"The worker was lost {MAX_LOST} times while it ran this job, so the job was given up. "
    "Send it again; if that fails, too, the request itself may be what ends the worker, and its "
    "log has the reason.",
)


def when_lost() -> tuple[int, str, str]:
    """What `jobs/store/lua/put_back.lua` needs to know of it."""
    return MAX_LOST, WORKER_LOST.model_dump_json(), WORKER_LOST.code
