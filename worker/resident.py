"""RQ's worker around a resident model.

A device cannot be held across a fork, so jobs run in this process (`SimpleWorker`). What RQ's
forking worker does beside a job is done here by threads: heartbeats while a job runs, so that a job
whose worker was killed is noticed within seconds and delivered again, and the standing offer in the
catalog. One queue per worker: RQ then takes jobs with BLMOVE, which loses none between Redis and
here.

A running job whose worker is killed is begun again by an idle worker after the heartbeat's time to
live and one round of maintenance, which is below 30 s. One case takes longer: a worker killed
between BLMOVE and the start of the job, some milliseconds, leaves the job in RQ's intermediate
list, and RQ gives it back only when it has seen it there for 60 s, so at least that long passes.

SIGTERM and SIGINT let the job in hand finish and take no other; the offer ends at once.
"""

from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import Any

from redis import Redis
from redis.exceptions import RedisError
from rq import Queue, SimpleWorker
from rq.exceptions import StopRequested
from rq.executions import Execution
from rq.job import Job
from rq.serializers import JSONSerializer

from jobs import catalog
from jobs.artifacts import ArtifactStore
from jobs.catalog import WorkerOffer
from jobs.store import JobStore
from worker.attempt import Workplace
from worker.engine import Engine
from worker.logs import JOB_ID
from worker.offering import StandingOffer
from worker.tasks import WORKPLACE

logger = logging.getLogger(__name__)

HEARTBEAT_TTL_S = 15
"""A job whose worker was silent this long is delivered again; a beat comes every third of it."""

WORKER_TTL_S = 30
"""How long RQ's entry of this worker outlives its last sign of life (RQ adds a minute)."""

DEQUEUE_WAIT_S = 2
"""How long one BLMOVE waits before RQ looks for abandoned jobs and asks again. Well below the
answer timeout of `jobs.connection`: a client that gives up first misses the job it is handed."""

MAINTENANCE_EVERY_S = 5
"""How often an idle worker looks for abandoned jobs."""

MAINTENANCE_LOCK_S = 10
"""With RQ's own 15 minutes, one worker killed during maintenance stops all others' for as long."""


class ResidentQueue(Queue):  # type: ignore[misc]  # rq is untyped to mypy here
    """RQ's queue with a maintenance lock that a killed worker does not hold for long."""

    def acquire_maintenance_lock(self) -> bool:
        return bool(
            self.connection.set(self.registry_cleaning_key, 1, nx=True, ex=MAINTENANCE_LOCK_S)
        )


class ResidentWorker(SimpleWorker):  # type: ignore[misc]  # rq is untyped to mypy here
    """One process, one device, one resident model, one queue."""

    def __init__(
        self,
        engine: Engine,
        redis: Redis,
        artifacts: ArtifactStore,
        *,
        heartbeat_ttl_s: int = HEARTBEAT_TTL_S,
        maintenance_every_s: int = MAINTENANCE_EVERY_S,
    ) -> None:
        # Unique for ever: RQ refuses the name of a worker that was killed a moment ago.
        name = f"{engine.model.name}.{uuid.uuid4().hex[:12]}"
        queue = catalog.queue_name(engine.model, engine.modes)
        super().__init__(
            [queue],
            name=name,
            connection=redis,
            serializer=JSONSerializer,
            queue_class=ResidentQueue,
            worker_ttl=WORKER_TTL_S,
            maintenance_interval=maintenance_every_s,
            log_job_description=False,
        )
        self.offer = WorkerOffer(
            worker_id=name,
            queue=queue,
            device=engine.device_name,
            model=engine.model,
            modes=engine.modes,
            started_at=datetime.now(UTC),
        )
        self.told_to_stop = False
        self._place = Workplace(name, engine, JobStore(redis), artifacts, threading.Event())
        self._standing_offer = StandingOffer(redis, self.offer, engine.tokenizer_text)
        self._heartbeat_ttl_s = heartbeat_ttl_s

    @property
    def dequeue_timeout(self) -> int:
        """Seconds one wait for a job lasts (RQ's: the worker's TTL less 15)."""
        return DEQUEUE_WAIT_S

    @property
    def connection_timeout(self) -> int:
        """The least answer timeout RQ wants; ours is longer, so the connection stays as it is."""
        return DEQUEUE_WAIT_S

    def work(self, *args: Any, **kwargs: Any) -> bool:
        """Offer the model and run jobs until told to stop (RQ's parameters)."""
        # RQ does this, too, but only after its first words with Redis: a signal that comes while
        # the offer is out already would end the process on the spot.
        self._install_signal_handlers()
        with suppress(StopRequested), self._standing_offer:
            logger.info(
                "ready: %s serves %s of %s on %s, queue %s",
                self.name,
                ", ".join(mode.name for mode in self.offer.modes),
                self.offer.model.name,
                self.offer.device,
                self.offer.queue,
            )
            return bool(super().work(*args, **kwargs))
        return False  # told to stop before RQ's loop began

    def execute_job(self, job: Job, queue: Queue) -> None:
        """Run one job in this thread, with its surroundings set and its heart beating."""
        self._place.stop.clear()
        place, job_id = WORKPLACE.set(self._place), JOB_ID.set(job.id)
        try:
            super().execute_job(job, queue)
        finally:
            WORKPLACE.reset(place)
            JOB_ID.reset(job_id)

    def perform_job(self, job: Job, queue: Queue, execution: Execution) -> bool:
        """Run the job while a thread sends its heartbeats."""
        with self._beating(job, execution):
            return bool(super().perform_job(job, queue, execution))

    def get_heartbeat_ttl(self, job: Job, working_time: float = 0.0) -> int:
        """Seconds of silence after which a job counts as abandoned."""
        return self._heartbeat_ttl_s

    def kill_horse(self, *_: Any) -> None:
        """Ask the job in hand to stop: what RQ's stop command, in its own thread, comes down to."""
        self._place.stop.set()

    def unsubscribe(self) -> None:
        """End the thread that listens for RQ's commands.

        RQ unsubscribes first and stops the thread afterwards; the thread may by then wait for the
        next message, up to a minute, and open a new connection when its own is closed under it.
        Told to stop first, it ends with the answer to unsubscribe.
        """
        if self.pubsub_thread is not None:
            self.pubsub_thread.stop()
        super().unsubscribe()

    def handle_warm_shutdown_request(self) -> None:
        """Take the offer back on the first signal. Runs in a signal handler: no I/O but the log."""
        self.told_to_stop = True
        self._standing_offer.end()
        logger.info("told to stop: the job in hand is finished first")

    @contextmanager
    def _beating(self, job: Job, execution: Execution) -> Iterator[None]:
        done = threading.Event()

        def beat() -> None:
            while not done.wait(self._heartbeat_ttl_s / 3):
                try:
                    self.maintain_heartbeats(job, execution)
                except RedisError as error:
                    logger.warning("no heartbeat for job %s: %s", job.id, error)

        thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
