"""Jobs that nobody works on although somebody should: found, and put back.

Two ways lead there. A worker is killed, hangs or loses its machine while it runs a job: the lease
in the record runs out. Or it dies between taking the id out of the queue and claiming the job: the
record says queued and no queue holds it. Every worker and every service process looks every few
seconds; the scripts decide, so it does not matter how many look at the same time.
"""

import logging
from collections.abc import Iterable
from typing import Final, cast

from redis import Redis
from rq import Queue

from jobs import delivery, keys, record, scripts
from jobs.errors import RecordUnreadable
from jobs.record import JobRecord
from jobs.state import JobState
from jobs.store import MAX_LOST, WORKER_LOST

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
    """Finds what was abandoned and puts it back. Safe to share between threads."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._look = scripts.load(redis, "look")
        self._put_back = scripts.load(redis, "put_back")
        self._redeliver = scripts.load(redis, "redeliver")
        self._unreadable: set[str] = set()

    def run(self) -> dict[str, str]:
        """Look once; returns what became of each job that was put back or given up, by its id."""
        done: dict[str, str] = {}
        for job in self._without_lease():
            answer = self._put_back(
                job.id,
                record.now().isoformat(),
                "",
                1,
                MAX_LOST,
                WORKER_LOST.model_dump_json(),
                WORKER_LOST.code,
                *delivery.rq_fields(self._redis, job),
            )
            if answer in (b"queued", b"failed", b"cancelled"):
                done[job.id] = answer.decode()
                logger.warning(
                    "job %s was abandoned by %s and is now %s", job.id, job.worker, done[job.id]
                )
        for job in self._missing():
            missing_ms = int(MISSING_S * 1000)
            if self._redeliver(job.id, missing_ms, *delivery.rq_fields(self._redis, job)):
                done[job.id] = "queued"
                logger.warning("job %s was in no queue and is put back into its own", job.id)
        return done

    def _without_lease(self) -> Iterable[JobRecord]:
        """The running jobs whose lease has run out, as far as this process can tell."""
        clock_ms, judged = self._look(int(GAP_S * 1000), int(GRACE_S * 1000))
        running = self._ids(JobState.RUNNING)
        if not judged or not running:
            return
        leases = self._fields(running, "lease_ms")
        lapsed = [name for name, lease in leases.items() if int(lease or 0) <= clock_ms]
        yield from self._read(lapsed)

    def _missing(self) -> Iterable[JobRecord]:
        """The queued jobs that are in no queue at this moment."""
        waiting = self._fields(self._ids(JobState.QUEUED), "queue")
        held: set[str] = set()
        for queue in {name.decode() for name in waiting.values() if name is not None}:
            key = Queue(queue, connection=self._redis).key
            held.update(cast("bytes", each).decode() for each in self._redis.lrange(key, 0, -1))
        yield from self._read([each for each in waiting if each not in held])

    def _fields(self, job_ids: list[str], field: str) -> dict[str, bytes | None]:
        """One field of many records, in one exchange."""
        with self._redis.pipeline(transaction=False) as pipe:
            for job_id in job_ids:
                pipe.hget(keys.record(job_id), field)
            return dict(zip(job_ids, pipe.execute(), strict=True))

    def _ids(self, state: JobState) -> list[str]:
        found = self._redis.zrange(keys.index(state.value), 0, -1)
        return [cast("bytes", each).decode() for each in found]

    def _read(self, job_ids: list[str]) -> Iterable[JobRecord]:
        for job_id in job_ids:
            fields = cast("dict[bytes, bytes]", self._redis.hgetall(keys.record(job_id)))
            try:
                if fields:
                    yield record.decode(job_id, fields)
            except RecordUnreadable as error:
                # Once, and not every few seconds until the record lapses.
                if job_id not in self._unreadable:
                    self._unreadable.add(job_id)
                    logger.error("cannot look after a job: %s", error)
