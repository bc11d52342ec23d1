"""Run comparisons: submit the jobs of their pairs, notice the ends, and prepare the copies.

One process at a time runs a round over all open comparisons. A round may be interrupted anywhere,
and even two at once do no harm: what a round does follows from what Redis holds, a half is noted as
asked for before its job is created, and the job is created with an Idempotency-Key of that half and
attempt, so that it is created once.

Jobs of comparisons wait for those of others: one is submitted only while no other job waits in its
queue, and at most `workers + 1` of them are open in a queue at a time.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Final

from redis import Redis
from redis.exceptions import LockError

from jobs import redis_keys
from jobs.artifacts.store import ArtifactStore
from jobs.catalog import Catalog
from jobs.errors import (
    ArtifactsUnavailable,
    ComparisonNotFound,
    GenerationFailed,
    InvalidSpec,
    JobNotCancellable,
    JobNotFound,
    ModeNotServed,
    NoLiveWorker,
    RecordUnreadable,
)
from jobs.record import Failure, JobRecord, now
from jobs.spec import CountTokens, resolve
from jobs.state import JobState
from jobs.store.job_store import JobStore
from jobs.store.submission import Submission
from service.comparisons.media import FfmpegAway, FfmpegRefused
from service.comparisons.model import (
    Arm,
    Comparison,
    ComparisonState,
    Half,
    HalfState,
    Pair,
    PairKind,
    PairState,
)
from service.comparisons.pair_jobs import (
    body_of,
    cancel_jobs,
    half_key,
    has_no_open_job,
    is_done,
)
from service.comparisons.store import ComparisonStore
from service.comparisons.viewing_copies import CopyMaker, VideoMissing, choose_source

logger = logging.getLogger(__name__)

EVERY_S: Final = 2.0
LOCK_S: Final = 60.0
"""How long a process that died during a round holds up the others. The copies of a pair take less;
should they take longer, two rounds overlap, which does no harm."""

COPIES_S: Final = 10.0
"""A round begins no further copies after so long, because jobs are to be submitted in time."""

UNSURE_AFTER: Final = timedelta(seconds=redis_keys.IDEMPOTENCY_TTL_S - 60 * 60)
"""A half that was asked for so long ago, and whose job is not known, may have had one: its key has
expired. It is not submitted again by itself."""


class Ending(Exception):
    """The process is to end, or another one has taken over."""


@dataclass(slots=True)
class _Round:
    """What a round knows: the catalog, its clock, and the open jobs of comparisons by queue."""

    until: float
    go_on: Callable[[], None]
    catalog: Catalog | None = None
    open: Counter[str] = field(default_factory=Counter)
    waiting: Counter[str] = field(default_factory=Counter)

    def count(self, job: JobRecord) -> None:
        """Count an open job."""
        self.open[job.queue] += 1
        self.waiting[job.queue] += job.state is JobState.QUEUED

    def why_full(self, queue: str) -> str | None:
        """Say why nothing may be submitted to a queue now; None if something may."""
        assert self.catalog is not None, "the catalog is read before anything is submitted"
        if self.catalog.waiting.get(queue, 0) > self.waiting[queue]:
            return "Other jobs wait; those of comparisons are submitted when none does."
        workers = sum(offer.queue == queue for offer in self.catalog.offers)
        return "" if self.open[queue] > workers else None


class Orchestrator:
    """Runs rounds. Safe to share between threads.

    Args:
        read_catalog: reads what live workers offer.
        count_tokens: as for `jobs.spec.resolve`.
    """

    def __init__(
        self,
        redis: Redis,
        jobs: JobStore,
        artifacts: ArtifactStore,
        read_catalog: Callable[[], Catalog],
        count_tokens: CountTokens | None = None,
    ) -> None:
        self._redis = redis
        self._jobs = jobs
        self._artifacts = artifacts
        self._comparisons = ComparisonStore(redis)
        self._read_catalog = read_catalog
        self._count_tokens = count_tokens
        self._passed_over: set[str] = set()  # comparisons of which it was said

    def run(self, ending: threading.Event) -> None:
        """Run a round, unless there is nothing to do or another process is running one."""
        names = self._comparisons.open_ids()
        lock = self._redis.lock(redis_keys.COMPARISONS_LOCK, timeout=LOCK_S, blocking=False)
        if not names or not lock.acquire():
            return

        def go_on() -> None:
            if ending.is_set():
                raise Ending
            try:
                lock.extend(LOCK_S, replace_ttl=True)
            except LockError as error:
                raise Ending from error

        try:
            with suppress(Ending):
                self.run_round(names, go_on)
        finally:
            with suppress(LockError):  # it expired, and another process has begun a round
                lock.release()

    def run_round(self, names: Sequence[str], go_on: Callable[[], None]) -> None:
        """Look at each of these comparisons once.

        Args:
            names: their ids.
            go_on: called often; raises Ending if the round is to end.
        """
        this = _Round(time.monotonic() + COPIES_S, go_on)
        # First for all of them: jobs of all comparisons count for what may be submitted.
        noticed: dict[str, list[Pair]] = {}
        for name in names:
            with self._passing_over(name):
                noticed[name] = self._notice_ends(name, this)
        # Afterwards, so that no job of a comparison is taken for one of others that waits.
        this.catalog = self._read_catalog()
        for name, pairs in noticed.items():
            go_on()
            with self._passing_over(name), suppress(ComparisonNotFound):  # it was deleted meanwhile
                self._advance(self._comparisons.get(name), pairs, this)

    @contextmanager
    def _passing_over(self, name: str) -> Iterator[None]:
        """Leave a comparison that cannot be read as it is, and say so once."""
        try:
            yield
        except RecordUnreadable as error:
            if name not in self._passed_over:
                self._passed_over.add(name)
                logger.error("comparison %s stands still, others go on: %s", name, error)

    def _notice_ends(self, name: str, this: _Round) -> list[Pair]:
        """Bring the halves of a comparison up to date with their jobs; return its pairs."""
        pairs = []
        this.go_on()
        with suppress(ComparisonNotFound):
            comparison = self._comparisons.get(name)
            for pair in self._comparisons.pairs(name):
                for arm in Arm:
                    pair = self._notice_end(comparison, pair, arm, this)  # noqa: PLW2901
                pairs.append(pair)
        return pairs

    def _notice_end(self, comparison: Comparison, pair: Pair, arm: Arm, this: _Round) -> Pair:
        half = pair.half(arm)
        try:
            if half.state.is_open and half.job_id is not None:
                job = self._jobs.get(half.job_id)
            elif half.state is HalfState.WAITING and half.asked_at is not None:
                found = self._jobs.replay(comparison.owner, half_key(comparison, pair, arm, half))
                if found is None:
                    return self._check_unsure(comparison, pair, arm)
                job = found.job
            else:
                return pair
        except JobNotFound:
            gone = Failure(code=JobNotFound.code, detail="Its job was deleted before it ended.")
            return self._end(comparison, pair, arm, half, gone)
        except RecordUnreadable:
            return pair  # another version's; its worker ends it
        if not job.state.is_terminal:
            this.count(job)
        return self._record(comparison, pair, arm, half.attempt, job)

    def _record(
        self, comparison: Comparison, pair: Pair, arm: Arm, attempt: int, job: JobRecord
    ) -> Pair:
        """Note the state of a half's job, unless the half was asked for again meanwhile."""

        def change(found: Pair) -> Pair | None:
            half = found.half(arm)
            if half.attempt != attempt or half.job_id not in (None, job.id):
                return None
            seen = {"job_id": job.id, "state": HalfState(job.state), "failure": job.failure}
            return found.with_half(arm, half.model_copy(update=seen))

        return self._comparisons.update_pair(comparison.id, pair.id, change)

    def _end(
        self, comparison: Comparison, pair: Pair, arm: Arm, seen: Half, failure: Failure
    ) -> Pair:
        """End a half without a video, if it is still as it was seen."""

        def change(found: Pair) -> Pair | None:
            if found.half(arm) != seen:
                return None
            ended = {"state": HalfState.FAILED, "failure": failure}
            return found.with_half(arm, seen.model_copy(update=ended))

        return self._comparisons.update_pair(comparison.id, pair.id, change)

    def _check_unsure(self, comparison: Comparison, pair: Pair, arm: Arm) -> Pair:
        half = pair.half(arm)
        if half.asked_at is None or now() - half.asked_at < UNSURE_AFTER:
            return pair
        detail = (
            "The service ended while it submitted this job, and was away for a day, so it is not "
            "known whether there is one; retry submits it."
        )
        return self._end(comparison, pair, arm, half, Failure(code="unsure", detail=detail))

    def _advance(self, comparison: Comparison, pairs: list[Pair], this: _Round) -> None:
        if comparison.state.is_final:
            self._wind_down(comparison, pairs)
            return
        problem = None
        if comparison.state is ComparisonState.RUNNING:
            problem = self._submit(comparison, pairs, this)
        try:
            self._prepare(comparison, this)
        except (ArtifactsUnavailable, GenerationFailed, FfmpegAway) as error:
            logger.warning("no copies for comparison %s: %s", comparison.id, error)
            problem = f"The videos cannot be copied for raters: {error}"
        if problem != comparison.problem:
            self._comparisons.set_problem(comparison.id, problem)
        self._comparisons.settle(comparison.id, is_done)

    def _wind_down(self, comparison: Comparison, pairs: Sequence[Pair]) -> None:
        """Cancel what is open; a comparison is settled once nothing is."""
        cancel_jobs(self._jobs, pairs)
        self._comparisons.settle(comparison.id, has_no_open_job)

    def _submit(self, comparison: Comparison, pairs: Sequence[Pair], this: _Round) -> str | None:
        """Submit waiting halves while there is room; return why it cannot go on."""
        blocked: dict[Arm, str] = {}
        for pair in pairs:
            for arm in Arm:
                is_waiting = pair.half(arm).state is HalfState.WAITING
                if pair.kind is PairKind.TEST and is_waiting and arm not in blocked:
                    this.go_on()
                    why = self._submit_half(comparison, pair, arm, this)
                    if why is not None:
                        blocked[arm] = why
            if len(blocked) == len(Arm):
                break
        return next((why for why in blocked.values() if why), None)

    def _submit_half(
        self, comparison: Comparison, pair: Pair, arm: Arm, this: _Round
    ) -> str | None:
        """Submit the job of a half; return why that is not possible now, if so."""
        assert this.catalog is not None, "the catalog is read before anything is submitted"
        try:
            body = body_of(comparison, pair, arm)
            request, queue = resolve(body, this.catalog, self._count_tokens)
        except InvalidSpec as error:
            refused = Failure(code=error.code, detail=error.detail)
            self._end(comparison, pair, arm, pair.half(arm), refused)
            return None
        except (ModeNotServed, NoLiveWorker) as error:
            return f"{error.detail} The comparison waits for one."
        why = this.why_full(queue)
        if why is not None:
            return why

        asked = self._ask(comparison, pair, arm)
        if asked is None:
            return None  # another process is at it, or it was retried or cancelled
        terms = Submission(
            owner=comparison.owner,
            metadata={"comparison": comparison.id, "pair": pair.id},
            idempotency=half_key(comparison, pair, arm, asked),
        )
        job = self._jobs.create(request, queue, terms).job
        this.count(job)
        try:
            self._record(comparison, pair, arm, asked.attempt, job)
        except ComparisonNotFound:
            # Deleted since: nobody would notice this job, so it is not left to run.
            with suppress(JobNotFound, JobNotCancellable):
                self._jobs.cancel(job.id)
            raise
        return None

    def _ask(self, comparison: Comparison, pair: Pair, arm: Arm) -> Half | None:
        """Note that a half is being submitted; None if it need not be."""
        asked: list[Half] = []

        def change(found: Pair) -> Pair | None:
            half = found.half(arm)
            asked.clear()
            if half.state is not HalfState.WAITING or half.attempt != pair.half(arm).attempt:
                return None
            # If it was asked for before, and has no job, this is the same attempt.
            attempt = half.attempt + (half.asked_at is None)
            again = half.model_copy(update={"attempt": attempt, "asked_at": now()})
            asked.append(again)
            return found.with_half(arm, again)

        self._comparisons.update_pair(comparison.id, pair.id, change)
        return asked[0] if asked else None

    def _prepare(self, comparison: Comparison, this: _Round) -> None:
        """Make the copies that can be made."""
        maker = CopyMaker(self._artifacts, comparison, this.go_on)
        pairs = self._comparisons.pairs(comparison.id)
        for pair in pairs:
            if time.monotonic() > this.until:
                return
            if pair.state is PairState.MADE:
                this.go_on()
                self._copy(comparison, pair, lambda each: self._copies_of_jobs(maker, each))
        tests = [pair for pair in pairs if pair.kind is PairKind.TEST]
        unmade = [pair for pair in pairs if pair.kind is not PairKind.TEST]
        unmade = [pair for pair in unmade if pair.state is PairState.WAITING]
        for pair in unmade:
            source = choose_source(comparison, self._comparisons.pairs(comparison.id), len(tests))
            if source is None or time.monotonic() > this.until:
                return
            this.go_on()
            self._copy(comparison, pair, lambda each, of=source: maker.of_source(each, of))  # type: ignore[misc]

    def _copies_of_jobs(self, maker: CopyMaker, pair: Pair) -> Pair:
        jobs = []
        for arm in Arm:
            job_id = pair.half(arm).job_id
            assert job_id is not None, "a half of a test pair that has succeeded has a job"
            try:
                job = self._jobs.get(job_id)
            except JobNotFound as error:
                raise VideoMissing(arm) from error
            if job.video_deleted_at is not None:
                raise VideoMissing(arm)
            jobs.append(job)
        return maker.of_jobs(pair, *jobs)

    def _copy(self, comparison: Comparison, pair: Pair, make: Callable[[Pair], Pair]) -> None:
        try:
            made = make(pair)
        except VideoMissing as error:
            if pair.kind is PairKind.TEST:
                self._end(comparison, pair, error.arm, pair.half(error.arm), error.failure)
                return
            made = pair.model_copy(update={"failure": error.failure})
        except FfmpegRefused as error:
            detail = f"The copies for raters cannot be made: {error}; retry makes them again."
            failure = Failure(code="copies_failed", detail=detail)
            made = pair.model_copy(update={"failure": failure})

        def change(found: Pair) -> Pair | None:
            return made if found == pair else None

        self._comparisons.update_pair(comparison.id, pair.id, change)
