"""RQ's worker around a resident model.

A device cannot be held across a fork, so jobs run in this process (`SimpleWorker`). RQ carries
their ids here and no more: who owns a job, and what becomes of one whose worker vanished, stands in
its record (`jobs/store/job_store.py`, `jobs/store/recovery.py`). So RQ's own ways to find lost
jobs, to stop them by alarm and to fail them on a second signal are switched off. One queue per
worker: RQ then takes jobs with BLMOVE, and one that was taken and not begun is found in no queue
and put back.

Beside a job run, in threads: the standing offer with the worker's status, the patrol for abandoned
jobs, and for the length of a job its lifeline and its watchdog.
"""

from __future__ import annotations

import dataclasses
import logging
import time
import uuid
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

from redis import Redis
from redis.exceptions import RedisError
from rq import Queue, SimpleWorker
from rq.exceptions import StopRequested
from rq.executions import Execution
from rq.job import Job
from rq.registry import StartedJobRegistry
from rq.serializers import JSONSerializer
from rq.timeouts import BaseDeathPenalty
from rq.worker_registration import clean_worker_registry

from jobs import catalog
from jobs.artifacts.store import ArtifactStore
from jobs.catalog import WorkerOffer, WorkerStatus
from jobs.store.job_store import JobStore
from worker.consumer.heartbeat import Heartbeat, RecoveryThread
from worker.interface import DeviceMemory, Engine
from worker.job.context import JobContext
from worker.process.drain import Drain, JobInHand
from worker.process.logs import JOB_ID
from worker.process.scratch import scratch_folder
from worker.process.stats import WorkerStats
from worker.settings import StallLimits
from worker.tasks import JOB_CONTEXT

logger = logging.getLogger(__name__)

RQ_TTL_S = 60
"""How long RQ's entries of this worker and its job outlive their last sign of life."""

DEQUEUE_WAIT_S = 1
"""How long one BLMOVE waits. A worker that is told to stop while it waits ends with the wait, and
not in it, so that no id is taken which nobody will run. Well below the answer timeout of
`jobs.redis_client`: a client that gives up first misses the job it is handed."""


class NoDeathPenalty(BaseDeathPenalty):  # type: ignore[misc]  # rq is untyped to mypy here
    """No alarm. RQ's raises between any two instructions of the main thread, also while an outcome
    is written; the job's own checks know its deadline, and the watchdog hears when they end."""

    def setup_death_penalty(self) -> None:
        """Set no alarm."""

    def cancel_death_penalty(self) -> None:
        """There is none."""


class ResidentWorker(SimpleWorker):  # type: ignore[misc]  # rq is untyped to mypy here
    """One process, one device, one resident model, one queue, one connection to Redis' life.

    When Redis is lost at the wrong moment `work` ends or raises; `worker/startup.py` then makes
    another one around the same engine, journal and drain.
    """

    death_penalty_class = NoDeathPenalty
    max_connection_wait_time = 2.0  # seconds, between RQ's tries to reach Redis while it is idle

    def __init__(
        self,
        engine: Engine,
        redis: Redis,
        artifacts: ArtifactStore,
        journal: WorkerStats | None = None,
        drain: Drain | None = None,
        limits: StallLimits | None = None,
    ) -> None:
        # Unique for ever: RQ refuses the name of a worker that was killed a moment ago.
        name = f"{engine.model.name}.{uuid.uuid4().hex[:12]}"
        queue = catalog.queue_name(engine.model, engine.modes)
        super().__init__(
            [queue],
            name=name,
            connection=redis,
            serializer=JSONSerializer,
            worker_ttl=RQ_TTL_S,
            log_job_description=False,
        )
        self.offer = WorkerOffer(
            worker_id=name,
            queue=queue,
            device=engine.device.name,
            model=engine.model,
            modes=engine.modes,
            started_at=datetime.now(UTC),
        )
        self.drain = drain or Drain()
        self._journal = journal or WorkerStats()
        self._idle = JobInHand(job_id="")
        self._place = JobContext(
            worker=name,
            engine=engine,
            redis=redis,
            store=JobStore(redis),
            artifacts=artifacts,
            scratch=Path(),
            journal=self._journal,
            drain=self.drain,
            limits=limits or StallLimits(),
            job=self._idle,
        )
        outage = self._journal.outage
        self._patrol = RecoveryThread(redis, outage)
        self._standing_offer = Heartbeat(
            redis, self.offer, engine.tokenizer_text, self._report, outage
        )

    def work(self, *args: Any, **kwargs: Any) -> bool:
        """Offer the model and run jobs until told to stop (RQ's parameters).

        Raises:
            RedisError: Redis was lost before the work began, or while it ended.
        """
        # RQ does this, too, but only after its first words with Redis: a signal that comes while
        # the offer is out already would end the process on the spot.
        self._install_signal_handlers()
        with scratch_folder() as scratch, self._standing_offer, self._patrol:
            self._place = dataclasses.replace(self._place, scratch=scratch)
            logger.info(
                "ready: %s serves %s of %s on %s, queue %s",
                self.name,
                ", ".join(mode.name for mode in self.offer.modes),
                self.offer.model.name,
                self.offer.device,
                self.offer.queue,
            )
            return bool(super().work(*args, **kwargs))

    # ------------------------------------------------------------------ one job

    def execute_job(self, job: Job, queue: Queue) -> None:
        """Run one job in this thread, with its surroundings set."""
        self._place = dataclasses.replace(self._place, job=JobInHand(job.id))
        if self.drain.told:
            self.drain.give_back = True  # told to stop while the id was on its way here
        place, job_id = JOB_CONTEXT.set(self._place), JOB_ID.set(job.id)
        self._standing_offer.refresh()
        try:
            super().execute_job(job, queue)
        finally:
            JOB_CONTEXT.reset(place)
            JOB_ID.reset(job_id)
            self._place = dataclasses.replace(self._place, job=self._idle)
            self._standing_offer.refresh()

    def handle_job_success(
        self,
        job: Job,
        queue: Queue,
        started_job_registry: StartedJobRegistry,
        execution: Execution,
    ) -> None:
        """Have RQ write that its job is finished, unless that is for somebody else to say."""
        if not self._place.job.not_ours:
            super().handle_job_success(job, queue, started_job_registry, execution)
            return
        with self.connection.pipeline() as pipeline:
            self.cleanup_execution(job, pipeline=pipeline, execution=execution)
            pipeline.execute()

    def kill_horse(self, *_: Any) -> None:
        """Ask the job in hand to stop: what RQ's stop command, in its own thread, comes down to."""
        self._place.job.stop = True

    # ------------------------------------------------------------------ signs of life

    def get_heartbeat_ttl(self, job: Job, working_time: float = 0.0) -> int:
        """Seconds after which RQ's entries of a job lapse."""
        return RQ_TTL_S

    def heartbeat(self, timeout: int | None = None, pipeline: Any = None) -> None:
        """RQ's sign of life. Its wait for jobs begins with it, and begins anew as long as Redis is
        away, so this is where a worker ends that is told to stop meanwhile."""
        try:
            super().heartbeat(timeout, pipeline)
        except RedisError:
            if self.drain.told:
                raise StopRequested from None
            raise

    def _report(self) -> WorkerStatus:
        """How this worker is doing. Called every few seconds from the thread of the offer, which
        keeps RQ's entries alive with it."""
        self._renew_rq_entries()
        job_id = self._place.job.job_id or None
        memory = self._memory()
        return WorkerStatus(
            worker_id=self.name,
            state="draining" if self.drain.told else "busy" if job_id else "idle",
            job_id=job_id,
            jobs_done=self._journal.jobs_done,
            memory_allocated_bytes=memory and memory.allocated_bytes,
            memory_peak_bytes=memory and memory.peak_bytes,
            memory_total_bytes=memory and memory.total_bytes,
            modes=self._journal.modes(),
        )

    def _memory(self) -> DeviceMemory | None:
        if self._journal.exit_status is not None:
            return None  # a device that is lost may never answer
        try:
            return self._place.engine.device.memory()
        except Exception:
            # Of whatever kind a driver's may be: the status is worth more than its figures.
            logger.warning("the device does not tell its memory", exc_info=True)
            return None

    def _renew_rq_entries(self) -> None:
        if self.birth_date is None:  # not registered yet
            return
        with self.connection.pipeline() as pipeline:
            # All of it: an entry that had lapsed while Redis was away comes back whole.
            pipeline.hset(self.key, mapping=self.serialize())
            self.heartbeat(RQ_TTL_S, pipeline=pipeline)
            pipeline.execute()
        for execution in list(self.executions.values()):
            self.maintain_heartbeats(execution.job, execution)

    def clean_registries(self) -> None:
        """Drop RQ's lapsed entries; what became of their jobs stands in our records.

        RQ's own cleaning would call jobs failed whose entries lapsed.
        """
        for queue in self.queues:
            for registry in (
                queue.started_job_registry,
                queue.finished_job_registry,
                queue.failed_job_registry,
            ):
                self.connection.zremrangebyscore(registry.key, 0, time.time())
            clean_worker_registry(queue)
        self.last_cleaned_at = datetime.now(UTC)

    def clean_group_registries(self) -> None:
        """There are no groups."""

    # ------------------------------------------------------------------ waiting, and the end

    @property
    def dequeue_timeout(self) -> int:
        """Seconds one wait for a job lasts (RQ's: the worker's TTL less 15)."""
        return DEQUEUE_WAIT_S

    @property
    def connection_timeout(self) -> int:
        """The least answer timeout RQ wants; ours is longer, so the connection stays as it is."""
        return DEQUEUE_WAIT_S

    @property
    def should_run_maintenance_tasks(self) -> bool:
        """RQ asks before each wait for a job: the place to end, where no job is in between."""
        if self.drain.told or self._journal.exit_status is not None:
            raise StopRequested
        return bool(super().should_run_maintenance_tasks)

    def request_stop(self, signum: int, frame: FrameType | None) -> None:
        """Note the wish to stop. Runs in a signal handler: no I/O but the log."""
        self.drain.tell()
        self._stop_requested = True  # ends the wait of a worker that `rq suspend` has put to sleep
        self._standing_offer.close()
        logger.info(
            "told to stop: the job in hand is %s",
            "given back" if self.drain.give_back else "finished first",
        )

    def teardown(self) -> None:
        """End RQ's part of the work, its listening thread for certain."""
        try:
            super().teardown()
        finally:
            if self.pubsub_thread is not None:
                self.pubsub_thread.stop()
                with suppress(RedisError, OSError):
                    self.pubsub.close()

    def unsubscribe(self) -> None:
        """End the thread that listens for RQ's commands.

        RQ unsubscribes first and stops the thread afterwards; the thread may by then wait for the
        next message, up to a minute, and open a new connection when its own is closed under it.
        Told to stop first, it ends with the answer to unsubscribe.
        """
        if self.pubsub_thread is not None:
            self.pubsub_thread.stop()
        super().unsubscribe()
