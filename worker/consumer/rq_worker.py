"""Run RQ's worker around a resident model.

A device cannot be held across a fork, so jobs run in this process (`SimpleWorker`). RQ only
delivers their ids. Who owns a job, and what happens when its worker dies, is decided by the job's
record (`jobs/store/job_store.py`, `jobs/store/recovery.py`). So three features of RQ are replaced:
it would mark abandoned jobs as failed (`clean_registries`), interrupt a job by an alarm
(`NoDeathPenalty`), and end a job on a second signal (`request_stop`).

Each worker has one queue, from which RQ takes ids with BLMOVE. If a worker dies between taking an
id and claiming the job, the id is in no queue. Recovery finds such jobs and queues them again.

Two threads run as long as the worker: the heartbeat, which publishes offer and status, and the
recovery of abandoned jobs. Two more run during a job: the lease keeper and the watchdog.
"""

from __future__ import annotations

import dataclasses
import logging
import time
import uuid
from contextlib import ExitStack, suppress
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
from jobs.catalog import WorkerOffer
from jobs.store.job_store import JobStore
from jobs.store.workers import WorkerStateName, WorkerStatus
from worker.consumer.delivery import Delivery
from worker.consumer.heartbeat import Heartbeat, RecoveryThread
from worker.consumer.probation import Probation
from worker.interface import JOB_ID, DeviceMemory, Engine
from worker.job.context import JobContext
from worker.process.drain import CurrentJob, Drain
from worker.process.ready_file import READY, ReadyFile
from worker.process.stats import WorkerStats
from worker.settings import StallLimits
from worker.tasks import JOB_CONTEXT

logger = logging.getLogger(__name__)

RQ_TTL_S = 60
"""How long RQ's entries of this worker and its job live after their last heartbeat."""

DEQUEUE_WAIT_S = 1
"""How long one BLMOVE waits. A worker that is asked to stop meanwhile ends after the wait and not
during it, so that it takes no id without running it. The wait is well below the answer timeout of
`jobs.redis_client`: a client that gives up first would lose the id that Redis sends it."""

_POLL_S = 0.1


class NoDeathPenalty(BaseDeathPenalty):  # type: ignore[misc]  # rq is untyped to mypy here
    """A replacement for RQ's alarm that does nothing.

    RQ's alarm raises between any two instructions of the main thread, even while an outcome is
    written. The job's own checks enforce its deadline, and the watchdog notices when they stop.
    """

    def setup_death_penalty(self) -> None:
        """Set no alarm."""

    def cancel_death_penalty(self) -> None:
        """Do nothing; there is no alarm."""


class ResidentWorker(SimpleWorker):  # type: ignore[misc]  # rq is untyped to mypy here
    """A worker of one process: one device, one resident model and one queue.

    RQ survives a loss of Redis while it waits for a job, but not at every other moment: `work` then
    returns or raises. `worker/consumer/serve.py` creates another `ResidentWorker` around the same
    engine, stats and drain.
    """

    death_penalty_class = NoDeathPenalty
    ready_file: Path | None = None
    """Where probes look; in the scratch folder if it is None."""

    max_connection_wait_time = 2.0  # seconds between RQ's attempts to reconnect while idle

    def __init__(
        self,
        engine: Engine,
        redis: Redis,
        artifacts: ArtifactStore,
        stats: WorkerStats | None = None,
        drain: Drain | None = None,
        limits: StallLimits | None = None,
    ) -> None:
        # Never used before: RQ refuses the name of a worker that was killed a moment ago.
        name = f"{engine.model.name}.{uuid.uuid4().hex[:12]}"
        queue = catalog.queue_name(engine.model, engine.modes)
        super().__init__(
            [queue],
            name=name,
            connection=redis,
            job_class=Delivery,
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
        self._stats = stats or WorkerStats()
        self._idle = CurrentJob(job_id="")
        self._context = JobContext(
            worker=name,
            engine=engine,
            redis=redis,
            store=JobStore(redis),
            artifacts=artifacts,
            scratch=Path(),
            stats=self._stats,
            drain=self.drain,
            limits=limits or StallLimits(),
            job=self._idle,
        )
        outage = self._stats.outage
        self._probation = Probation(self._stats, self.drain, artifacts)
        self._recovery = RecoveryThread(redis, outage)
        self._heartbeat = Heartbeat(redis, self.offer, engine.tokenizer_text, self._status, outage)
        self._heartbeat.follow_orders_for(self.drain)

    def work(self, *args: Any, **kwargs: Any) -> bool:
        """Offer the model and run jobs until asked to stop; the parameters are RQ's.

        Raises:
            RedisError: Redis was lost before the work started, or while it ended.
        """
        # RQ installs them too, but only after its first commands to Redis. By then the offer is
        # published, and a signal that arrived before would end the process at once.
        self._install_signal_handlers()
        with ExitStack() as opened:
            # The first proof before anything is published: a healthy worker is never seen degraded.
            proven = None if self._stats.fault else self._probation.prove(opened)
            if proven is not None:
                self._place_ready_file(proven)
            opened.enter_context(self._heartbeat)
            opened.enter_context(self._recovery)
            scratch = proven or self._probation.wait_until_proven(opened)
            if scratch is None:
                return False
            self._place_ready_file(scratch)
            self._heartbeat.refresh()
            self._context = dataclasses.replace(self._context, scratch=scratch)
            logger.info(
                "ready: %s serves %s of %s on %s, queue %s",
                self.name,
                ", ".join(mode.name for mode in self.offer.modes),
                self.offer.model.name,
                self.offer.device,
                self.offer.queue,
            )
            return bool(super().work(*args, **kwargs))

    def _place_ready_file(self, scratch: Path) -> None:
        if self._heartbeat.ready_file is None:
            self._heartbeat.ready_file = ReadyFile(self.ready_file or scratch / READY)

    # ------------------------------------------------------------------ one job

    def execute_job(self, job: Job, queue: Queue) -> None:
        """Run one job in this thread, with `JOB_CONTEXT` and `JOB_ID` set."""
        self._context = dataclasses.replace(self._context, job=CurrentJob(job.id))
        if self.drain.stopping:
            self.drain.return_job = True  # stop was requested while the id was on its way here
        context_token, id_token = JOB_CONTEXT.set(self._context), JOB_ID.set(job.id)
        self._heartbeat.refresh()
        try:
            super().execute_job(job, queue)
        finally:
            JOB_CONTEXT.reset(context_token)
            JOB_ID.reset(id_token)
            self._context = dataclasses.replace(self._context, job=self._idle)
            self._heartbeat.refresh()

    def handle_job_success(
        self,
        job: Job,
        queue: Queue,
        started_job_registry: StartedJobRegistry,
        execution: Execution,
    ) -> None:
        """Have RQ mark the job as finished, unless another worker or the queue owns it now."""
        if not self._context.job.owned_elsewhere:
            super().handle_job_success(job, queue, started_job_registry, execution)
            return
        with self.connection.pipeline() as pipeline:
            self.cleanup_execution(job, pipeline=pipeline, execution=execution)
            pipeline.execute()

    def kill_horse(self, *_: Any) -> None:
        """Ask the current job to stop. RQ's stop command calls this from its own thread."""
        self._context.job.stop = True

    # ------------------------------------------------------------------ heartbeats

    def get_heartbeat_ttl(self, job: Job, working_time: float = 0.0) -> int:
        """Return the seconds after which RQ's entries of a job expire."""
        return RQ_TTL_S

    def heartbeat(self, timeout: int | None = None, pipeline: Any = None) -> None:
        """Send RQ's heartbeat, or end a worker that was asked to stop while Redis is unreachable.

        RQ calls this at the start of each wait for a job and again as long as Redis is away.
        """
        try:
            super().heartbeat(timeout, pipeline)
        except RedisError:
            if self.drain.stopping:
                raise StopRequested from None
            raise

    def _status(self) -> WorkerStatus:
        """Compute the worker's status, and renew RQ's entries.

        Called every few seconds from the heartbeat's thread.
        """
        self._renew_rq_entries()
        job_id = self._context.job.job_id or None
        memory = self._memory()
        state = self._status_name(job_id)
        return WorkerStatus(
            worker_id=self.name,
            state=state,
            fault=self._stats.fault,
            job_id=job_id,
            jobs_done=self._stats.jobs_done,
            memory_allocated_bytes=memory and memory.allocated_bytes,
            memory_peak_bytes=memory and memory.peak_bytes,
            memory_total_bytes=memory and memory.total_bytes,
            modes=self._stats.modes(),
            withheld=None if state in ("idle", "busy") else self.offer,
        )

    def _status_name(self, job_id: str | None) -> WorkerStateName:
        if self.drain.stopping:
            return "draining"
        if self._stats.fault is not None:
            return "degraded"
        if self.drain.order is not None:
            return "drained" if self.drain.waiting else "draining"
        return "busy" if job_id else "idle"

    def _memory(self) -> DeviceMemory | None:
        if self._stats.exit_status is not None:
            return None  # a lost device may never answer
        try:
            return self._context.engine.device.memory()
        except Exception:
            # A driver may raise anything, and the status matters more than its memory figures.
            logger.warning("the device does not tell its memory", exc_info=True)
            return None

    def _renew_rq_entries(self) -> None:
        if self.birth_date is None:  # not registered yet
            return
        with self.connection.pipeline() as pipeline:
            # The whole entry, because it may have expired while Redis was unreachable.
            pipeline.hset(self.key, mapping=self.serialize())
            self.heartbeat(RQ_TTL_S, pipeline=pipeline)
            pipeline.execute()
        for execution in list(self.executions.values()):
            self.maintain_heartbeats(execution.job, execution)

    def clean_registries(self) -> None:
        """Drop RQ's expired entries; the job records say what happened to their jobs.

        RQ's own method would mark the jobs of expired entries as failed.
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
        """Do nothing; there are no groups."""

    # ------------------------------------------------------------------ waiting, and the end

    @property
    def dequeue_timeout(self) -> int:
        """The seconds that one wait for a job lasts; by RQ's default the worker's TTL less 15."""
        return DEQUEUE_WAIT_S

    @property
    def connection_timeout(self) -> int:
        """The least socket timeout that RQ demands; ours is longer, so RQ does not change it."""
        return DEQUEUE_WAIT_S

    @property
    def should_run_maintenance_tasks(self) -> bool:
        """Stop the worker if asked to, or if it is at fault: `serve` then makes the next one.

        RQ reads this before each wait, when no job can be lost. So this is also where a drained
        worker waits until it is to take jobs again.
        """
        if not self._is_ending and self.drain.order is not None:
            self._wait_while_drained()
        if self._is_ending:
            raise StopRequested
        return bool(super().should_run_maintenance_tasks)

    @property
    def _is_ending(self) -> bool:
        stats = self._stats
        return self.drain.stopping or stats.exit_status is not None or stats.fault is not None

    def _wait_while_drained(self) -> None:
        self.drain.waiting = True
        self._heartbeat.refresh()
        # In short pieces, since a signal does not end a sleep. Redis is left to the heartbeat.
        while self.drain.order is not None and not self._is_ending:
            time.sleep(_POLL_S)
        self.drain.waiting = False
        self._heartbeat.refresh()

    def request_stop(self, signum: int, frame: FrameType | None) -> None:
        """Record the request to stop. Runs in a signal handler: no I/O but the log."""
        self.drain.request_stop()
        self._stop_requested = True  # ends the wait of a worker that `rq suspend` paused
        self._heartbeat.close()
        logger.info(
            "told to stop: the job in hand is %s",
            "given back" if self.drain.return_job else "finished first",
        )

    def teardown(self) -> None:
        """End RQ's part of the work, and make sure that its listening thread ends."""
        try:
            super().teardown()
        finally:
            if self.pubsub_thread is not None:
                self.pubsub_thread.stop()
                with suppress(RedisError, OSError):
                    self.pubsub.close()

    def unsubscribe(self) -> None:
        """End the thread that listens for RQ's commands.

        RQ unsubscribes first and stops the thread afterwards. By then the thread may be waiting for
        the next message, up to a minute, and open a new connection when its own is closed. Stopped
        first, it ends with the answer to unsubscribe.
        """
        if self.pubsub_thread is not None:
            self.pubsub_thread.stop()
        super().unsubscribe()
