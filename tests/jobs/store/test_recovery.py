"""Test lost, released and never started attempts: the job is queued again, or failed."""

import time
from datetime import datetime, timedelta
from importlib.resources import files

import pytest
from redis import Redis
from rq import Queue
from rq.job import Job
from rq.serializers import JSONSerializer

from jobs import record, redis_keys
from jobs.errors import JobHeld, StaleAttempt
from jobs.record import Attempt, Progress, Stage, StageTimings, Video
from jobs.spec import GenerationRequest
from jobs.state import JobState
from jobs.store.job_store import JobStore
from jobs.store.recovery import MAX_LOST, MAX_RETURNED, MISSING_S, Recovery
from jobs.store.rq_entry import UNKNOWN_DEADLINE_S
from jobs.store.submission import Submission

QUEUE = "q"


@pytest.fixture
def recovery(redis: Redis) -> Recovery:
    return Recovery(redis)


@pytest.fixture
def job_id(store: JobStore, request_for_video: GenerationRequest) -> str:
    return store.create(request_for_video, QUEUE).job.id


def queued(redis: Redis) -> list[str]:
    return [str(each) for each in Queue(QUEUE, connection=redis).job_ids]


def take(redis: Redis, store: JobStore, job_id: str) -> Attempt:
    """Do what a worker does: take the id out of the queue, then claim the job."""
    redis.lrem(Queue(QUEUE, connection=redis).key, 1, job_id)
    return store.claim(job_id, "worker-1")


def expire_lease(redis: Redis, job_id: str) -> None:
    redis.hset(redis_keys.record(job_id), "lease_ms", 1)


def test_a_live_attempt_is_left_alone_and_cannot_be_claimed_away(
    redis: Redis, store: JobStore, recovery: Recovery, job_id: str
) -> None:
    attempt = take(redis, store, job_id)
    with pytest.raises(JobHeld, match="Attempt 1"):
        store.claim(job_id, "worker-2")
    assert recovery.run() == {}
    assert store.get(job_id).worker == "worker-1"
    assert store.renew(attempt) is False


def test_a_lost_attempt_is_put_back_to_the_front(
    redis: Redis,
    store: JobStore,
    recovery: Recovery,
    job_id: str,
    request_for_video: GenerationRequest,
) -> None:
    lost = take(redis, store, job_id)
    other = store.create(request_for_video, QUEUE).job.id
    expire_lease(redis, job_id)
    assert recovery.run() == {job_id: "queued"}
    job = store.get(job_id)
    assert (job.state, job.attempts, job.lost, job.worker) == (JobState.QUEUED, 1, 1, None)
    assert queued(redis) == [job_id, other]
    rq_job = Job.fetch(job_id, connection=redis, serializer=JSONSerializer)
    assert rq_job.args == [job_id]
    with pytest.raises(StaleAttempt):
        store.renew(lost)
    assert recovery.run() == {}


def test_a_renewed_lease_does_not_expire(
    redis: Redis, store: JobStore, recovery: Recovery, job_id: str
) -> None:
    attempt = take(redis, store, job_id)
    expire_lease(redis, job_id)
    store.renew(attempt)
    assert recovery.run() == {}


def test_a_job_that_keeps_losing_its_worker_is_given_up(
    redis: Redis, store: JobStore, recovery: Recovery, job_id: str
) -> None:
    for number in range(1, MAX_LOST + 1):
        assert take(redis, store, job_id).number == number
        expire_lease(redis, job_id)
        assert recovery.run() == {job_id: "failed" if number == MAX_LOST else "queued"}
    job = store.get(job_id)
    assert (job.state, job.attempts, job.lost) == (JobState.FAILED, MAX_LOST, MAX_LOST)
    assert job.failure is not None
    assert job.failure.code == "worker_lost"
    assert "lost 2 times" in job.failure.detail
    assert queued(redis) == []


def test_a_released_attempt_is_not_lost(
    redis: Redis, store: JobStore, recovery: Recovery, job_id: str
) -> None:
    for number in range(1, 2 * MAX_LOST + 1):
        attempt = take(redis, store, job_id)
        assert attempt.number == number
        assert store.release(attempt) is JobState.QUEUED
        assert queued(redis) == [job_id]
    assert store.get(job_id).lost == 0


@pytest.mark.parametrize("end", ["release", "give_up", "hand_back", "expire"])
def test_an_attempt_that_ends_without_its_job_leaves_nothing_of_itself(
    redis: Redis, store: JobStore, recovery: Recovery, job_id: str, end: str
) -> None:
    attempt = take(redis, store, job_id)
    store.progress(attempt, Progress(stage=Stage.DENOISE, step=1, steps=2))
    assert store.get(job_id).started_at is not None
    if end == "expire":
        expire_lease(redis, job_id)
        recovery.run()
    elif end == "hand_back":
        store.hand_back(attempt, "The disk is full.")
    else:
        getattr(store, end)(attempt)
    job = store.get(job_id)
    assert (job.state, job.attempts) == (JobState.QUEUED, 1)
    assert (job.started_at, job.worker, job.progress) == (None, None, None)
    fields = redis.hgetall(redis_keys.record(job_id)).keys()
    assert not {b"token", b"lease_ms", b"started_at", b"started_ms", b"worker"} & set(fields)
    again = take(redis, store, job_id)
    assert (again.number, store.get(job_id).worker) == (2, "worker-1")
    assert store.get(job_id).started_at is not None


def test_attempts_that_workers_at_fault_gave_back_have_a_limit_of_their_own(
    redis: Redis, store: JobStore, job_id: str
) -> None:
    store.give_up(take(redis, store, job_id))
    for number in range(1, MAX_RETURNED + 1):
        attempt = take(redis, store, job_id)
        state = store.hand_back(attempt, f"Reason {number}.")
        assert state is (JobState.FAILED if number == MAX_RETURNED else JobState.QUEUED)
        assert queued(redis) == ([] if number == MAX_RETURNED else [job_id])
    job = store.get(job_id)
    assert job.lost == 1
    assert job.failure is not None
    assert job.failure.code == "worker_unfit"
    assert f"Reason {MAX_RETURNED}." in job.failure.detail


def test_an_attempt_of_before_cannot_give_a_job_back(
    redis: Redis, store: JobStore, recovery: Recovery, job_id: str
) -> None:
    old = take(redis, store, job_id)
    expire_lease(redis, job_id)
    recovery.run()
    new = take(redis, store, job_id)
    with pytest.raises(StaleAttempt):
        store.hand_back(old, "The disk is full.")
    assert store.renew(new) is False


def test_giving_up_counts_as_lost(redis: Redis, store: JobStore, job_id: str) -> None:
    assert store.give_up(take(redis, store, job_id)) is JobState.QUEUED
    assert store.give_up(take(redis, store, job_id)) is JobState.FAILED


@pytest.mark.parametrize("end", ["release", "give_up", "expire"])
def test_a_job_to_be_cancelled_is_not_queued_again(
    redis: Redis, store: JobStore, recovery: Recovery, job_id: str, end: str
) -> None:
    attempt = take(redis, store, job_id)
    store.cancel(job_id)
    assert store.renew(attempt) is True
    if end == "expire":
        expire_lease(redis, job_id)
        assert recovery.run() == {job_id: "cancelled"}
    else:
        assert getattr(store, end)(attempt) is JobState.CANCELLED
    assert store.get(job_id).state is JobState.CANCELLED
    assert queued(redis) == []


def test_a_job_taken_and_never_claimed_is_delivered_again(
    redis: Redis, store: JobStore, recovery: Recovery, job_id: str
) -> None:
    queue = Queue(QUEUE, connection=redis)
    redis.lmove(queue.key, queue.intermediate_queue_key)
    assert recovery.run() == {}, "it has only just been seen"
    redis.hset(redis_keys.record(job_id), "missing_ms", 1)
    assert recovery.run() == {job_id: "queued"}
    assert queued(redis) == [job_id]
    assert redis.llen(queue.intermediate_queue_key) == 0
    job = store.get(job_id)
    assert (job.attempts, job.lost) == (0, 0)


def commands(redis: Redis) -> int:
    """Count the commands that Redis was sent, with those of pipelines."""
    return sum(stats["calls"] for stats in redis.info("commandstats").values())


def test_a_look_costs_the_same_however_many_jobs_wait(
    redis: Redis, store: JobStore, recovery: Recovery, request_for_video: GenerationRequest
) -> None:
    store.create(request_for_video, QUEUE)
    recovery.run()  # the first compares all jobs with the queues
    costs = []
    for more in (0, 50):
        for _ in range(more):
            store.create(request_for_video, QUEUE)
        before = commands(redis)
        recovery.run()
        costs.append(commands(redis) - before)
    assert costs[0] == costs[1] < 15


def test_an_id_that_is_in_a_queue_by_mistake_hides_no_missing_job_for_long(
    redis: Redis, store: JobStore, job_id: str
) -> None:
    quick, seldom = Recovery(redis, scan_every_s=0), Recovery(redis)
    assert seldom.run() == quick.run() == {}
    key = Queue(QUEUE, connection=redis).key
    redis.lrem(key, 1, job_id)
    redis.rpush(key, "no-job")
    seldom.run()
    assert redis.hget(redis_keys.record(job_id), "missing_ms") is None
    quick.run()
    redis.hset(redis_keys.record(job_id), "missing_ms", 1)
    assert quick.run() == {job_id: "queued"}


def test_a_job_that_was_missing_once_is_not_missing_at_once_again(
    redis: Redis, store: JobStore, recovery: Recovery, job_id: str
) -> None:
    """A worker that claims late ends the search; the next time is judged by itself."""
    redis.delete(Queue(QUEUE, connection=redis).key)
    redis.hset(redis_keys.record(job_id), "missing_ms", 1)
    store.release(store.claim(job_id, "worker-1"))
    redis.delete(Queue(QUEUE, connection=redis).key)
    assert recovery.run() == {}, "it has only just been seen"


def test_a_waiting_job_is_never_missing(
    redis: Redis,
    store: JobStore,
    recovery: Recovery,
    job_id: str,
    request_for_video: GenerationRequest,
) -> None:
    second = store.create(request_for_video, QUEUE).job.id
    for each in (job_id, second):
        redis.hset(redis_keys.record(each), "missing_ms", 1)
    assert recovery.run() == {}
    assert queued(redis) == [job_id, second]


def test_a_job_that_is_in_its_queue_again_when_it_is_to_be_put_back_is_left_there(
    redis: Redis,
    store: JobStore,
    recovery: Recovery,
    job_id: str,
    request_for_video: GenerationRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another process was faster, between the look at the queues and the script."""
    second = store.create(request_for_video, QUEUE).job.id
    redis.hset(redis_keys.record(second), "missing_ms", 1)
    with monkeypatch.context() as patched:
        patched.setattr(recovery, "_missing", lambda: [second])
        assert recovery.run() == {}
    assert queued(redis) == [job_id, second], "nothing moved, and nothing is there twice"
    redis.lrem(Queue(QUEUE, connection=redis).key, 1, second)
    assert recovery.run() == {}, "it counts as missing only from now on"


def test_a_job_that_ends_while_it_is_looked_at_is_not_reported(
    redis: Redis, store: JobStore, recovery: Recovery, job_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt = take(redis, store, job_id)
    expire_lease(redis, job_id)
    find = recovery._with_expired_lease

    def just_before_its_end() -> list[str]:
        found = list(find())
        store.cancelled(attempt)
        return found

    monkeypatch.setattr(recovery, "_with_expired_lease", just_before_its_end)
    assert recovery.run() == {}
    assert store.get(job_id).lost == 0


def test_a_lease_that_is_renewed_while_it_is_looked_at_is_kept(
    redis: Redis, store: JobStore, recovery: Recovery, job_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The script decides, not what was read before it: a job that runs is never taken away."""
    attempt = take(redis, store, job_id)
    expire_lease(redis, job_id)
    find = recovery._with_expired_lease

    def just_before_it_is_renewed() -> list[str]:
        found = list(find())
        assert found == [job_id]
        store.renew(attempt)
        return found

    monkeypatch.setattr(recovery, "_with_expired_lease", just_before_it_is_renewed)
    assert recovery.run() == {}
    job = store.get(job_id)
    assert (job.state, job.lost, job.worker) == (JobState.RUNNING, 0, "worker-1")
    assert queued(redis) == []
    assert store.renew(attempt) is False, "it still holds the job"


def test_a_job_that_is_claimed_while_it_is_looked_for_is_not_delivered_again(
    redis: Redis, store: JobStore, recovery: Recovery, job_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    redis.delete(Queue(QUEUE, connection=redis).key)
    redis.hset(redis_keys.record(job_id), "missing_ms", 1)
    find = recovery._missing

    def just_before_it_is_claimed() -> list[str]:
        found = list(find())
        assert found == [job_id]
        store.claim(job_id, "worker-1")
        return found

    monkeypatch.setattr(recovery, "_missing", just_before_it_is_claimed)
    assert recovery.run() == {}
    assert queued(redis) == []
    assert store.get(job_id).state is JobState.RUNNING


def test_priority_goes_before_all_others_and_behind_its_own_kind(
    redis: Redis, store: JobStore, request_for_video: GenerationRequest
) -> None:
    def create(priority: bool) -> str:
        return store.create(request_for_video, QUEUE, Submission(priority=priority)).job.id

    plain, first, late, second = map(create, (False, True, False, True))
    assert queued(redis) == [first, second, plain, late]


def test_after_a_gap_holders_get_the_time_to_renew(
    redis: Redis,
    store: JobStore,
    recovery: Recovery,
    job_id: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A Redis outage that is longer than a lease makes no job lost."""
    monkeypatch.setattr("jobs.store.recovery.GRACE_S", 0.2)
    attempt = take(redis, store, job_id)
    recovery.run()
    redis.hset(redis_keys.RECOVERY, "looked_ms", 1)  # as if no process had looked since
    expire_lease(redis, job_id)
    assert recovery.run() == {}
    assert Recovery(redis).run() == {}  # neither does a new process judge it
    time.sleep(0.25)
    assert recovery.run() == {job_id: "queued"}
    with pytest.raises(StaleAttempt):
        store.renew(attempt)


def test_an_unreadable_record_is_put_back_like_any_other(
    redis: Redis, store: JobStore, recovery: Recovery, job_id: str
) -> None:
    """The worker that takes it fails it."""
    recovery.run()
    take(redis, store, job_id)
    expire_lease(redis, job_id)
    redis.hset(redis_keys.record(job_id), mapping={"request": "{", "deadline_s": "soon"})
    assert recovery.run() == {job_id: "queued"}
    assert queued(redis) == [job_id]
    redis.delete(Queue(QUEUE, connection=redis).key)
    recovery.run()
    redis.hset(redis_keys.record(job_id), "missing_ms", 1)
    assert recovery.run() == {job_id: "queued"}
    assert queued(redis) == [job_id]
    rq_job = Job.fetch(job_id, connection=redis, serializer=JSONSerializer)
    assert (rq_job.args, rq_job.timeout) == ([job_id], UNKNOWN_DEADLINE_S)


def test_an_unrecoverable_record_is_logged_once_and_does_not_stop_the_others(
    redis: Redis,
    store: JobStore,
    recovery: Recovery,
    request_for_video: GenerationRequest,
    job_id: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    other = store.create(request_for_video, QUEUE).job.id
    for each in (job_id, other):
        take(redis, store, each)
        expire_lease(redis, each)
    redis.hdel(redis_keys.record(job_id), "shape")
    assert recovery.run() == {other: "queued"}
    assert recovery.run() == {}
    assert caplog.text.count(f"cannot look after job {job_id}") == 1


HOUR_MS = 3600 * 1000


def set_clock(redis: Redis, ms: int) -> None:
    """Do to what is stored what setting Redis' clock ahead by `ms` (or back) would do.

    A stored time is then as much older (or younger), as Redis' own clock cannot be set.
    """
    for name in [redis_keys.RECOVERY, *redis.scan_iter(f"{redis_keys.RECORD_PREFIX}*")]:
        for field, value in redis.hgetall(name).items():
            assert isinstance(field, bytes)
            if field.endswith(b"_ms"):
                redis.hset(name, field, int(value) - ms)


@pytest.mark.parametrize("ms", [60_000, HOUR_MS, -60_000, -HOUR_MS], ids=str)
def test_a_clock_that_jumps_takes_no_job_from_a_live_worker(
    redis: Redis,
    store: JobStore,
    recovery: Recovery,
    job_id: str,
    monkeypatch: pytest.MonkeyPatch,
    ms: int,
) -> None:
    recovery.run()
    attempt = take(redis, store, job_id)
    set_clock(redis, ms)
    assert recovery.run() == {}
    assert store.renew(attempt) is False, "it has the time to renew"
    monkeypatch.setattr("jobs.store.recovery.GRACE_S", 0)
    assert recovery.run() == {}
    assert store.get(job_id).lost == 0


@pytest.mark.parametrize("ms", [60_000, HOUR_MS, -60_000, -HOUR_MS], ids=str)
def test_after_a_jump_of_the_clock_a_dead_worker_keeps_its_job_no_longer_than_else(
    redis: Redis,
    store: JobStore,
    recovery: Recovery,
    job_id: str,
    monkeypatch: pytest.MonkeyPatch,
    ms: int,
) -> None:
    """Set back by an hour, the clock would need an hour to reach the end of the old lease."""
    recovery.run()
    take(redis, store, job_id)
    set_clock(redis, ms)
    assert recovery.run() == {}
    monkeypatch.setattr("jobs.store.recovery.GRACE_S", 0)  # the holder does not renew meanwhile
    assert recovery.run() == {job_id: "queued"}
    assert store.get(job_id).lost == 1


def test_after_a_jump_of_the_clock_leases_are_judged_again_soon(
    redis: Redis, recovery: Recovery
) -> None:
    """Otherwise nothing would be recovered until the clock is where it was."""
    redis.hset(redis_keys.RECOVERY, mapping={"looked_ms": 1, "gap_ms": 1})
    recovery.run()
    set_clock(redis, -HOUR_MS)
    recovery.run()
    second, microsecond = redis.time()
    gap_ms = redis.hget(redis_keys.RECOVERY, "gap_ms")
    assert gap_ms is not None
    assert int(gap_ms) <= second * 1000 + microsecond // 1000


def test_a_job_that_was_missing_before_the_clock_was_set_back_is_delivered_soon(
    redis: Redis, store: JobStore, recovery: Recovery, job_id: str
) -> None:
    redis.lrem(Queue(QUEUE, connection=redis).key, 1, job_id)
    recovery.run()
    set_clock(redis, -HOUR_MS)
    recovery.run()
    missing_ms = redis.hget(redis_keys.record(job_id), "missing_ms")
    assert missing_ms is not None
    set_clock(redis, int(MISSING_S * 1000) + 1)
    assert recovery.run() == {job_id: "queued"}


def test_a_clock_that_was_set_back_makes_no_negative_durations(
    redis: Redis, store: JobStore, job_id: str
) -> None:
    set_clock(redis, -HOUR_MS)
    attempt = take(redis, store, job_id)
    set_clock(redis, -HOUR_MS)
    video = Video(key="a", bytes=3, sha256="ab", width=96, height=96, num_frames=17, fps=8)
    zero = StageTimings(queue_s=0, text_encoder_s=0, denoise_s=0, vae_s=0, mp4_s=0, total_s=0)
    store.succeed(attempt, video, zero)
    sums = {k: float(v) for k, v in redis.hgetall(redis_keys.METRICS).items() if k[-3:] == b"sum"}
    assert len(sums) == 2
    assert set(sums.values()) == {0.0}


@pytest.mark.parametrize(
    "moment",
    ["2024-02-29T23:59:59", "2026-11-30T04:25:40", "2027-01-01T00:00:00", "2100-03-01T12:00:00"],
)
def test_times_of_redis_are_written_as_dates(redis: Redis, moment: str) -> None:
    """The scripts stamp ends of jobs by Redis' clock, whatever the hosts' clocks say."""
    at = datetime.fromisoformat(moment + "+00:00")
    prelude = (files("jobs.store") / "lua" / "prelude.lua").read_text(encoding="utf-8")
    start = prelude.index("local function stamp()")
    function = prelude[start : prelude.index("\nend", start) + 4]
    function = function.replace("redis.call('TIME')", "{ARGV[1], ARGV[2]}")
    for microsecond in (0, 7, 999_999):
        text = redis.eval(f"{function} return stamp()", 0, int(at.timestamp()), microsecond)
        assert datetime.fromisoformat(text.decode()) == at.replace(microsecond=microsecond)


def test_ends_of_jobs_are_by_the_clock_of_redis(
    redis: Redis, store: JobStore, job_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker's host that is eight days behind would make its videos look eight days old."""
    days = timedelta(days=8)
    real = record.now
    monkeypatch.setattr(record, "now", lambda: real() - days)
    store.cancelled(take(redis, store, job_id))
    job = store.get(job_id)
    assert job.finished_at is not None
    assert job.finished_at > real() - timedelta(minutes=1)
