"""Test the store with a real Valkey: creation, attempts, ends, cancelling, order."""

import json
from typing import Literal

import pytest
from redis import Redis
from rq import Queue
from rq.job import Job
from rq.serializers import JSONSerializer

from jobs import redis_keys
from jobs.durations import timeout_s
from jobs.errors import (
    InvalidSpec,
    JobAlreadyFinished,
    JobHeld,
    JobNotCancellable,
    JobNotFound,
    RecordUnreadable,
    StaleAttempt,
)
from jobs.record import Attempt, Failure, Progress, Stage, StageTimings, Video
from jobs.spec import GenerationRequest
from jobs.state import TRANSITIONS, JobState
from jobs.store.job_store import JobStore, new_token
from jobs.store.listing import MAX_PAGE, SKIP_PAGE
from jobs.store.live import events
from jobs.store.recovery import Recovery
from jobs.store.rq_entry import TASK

QUEUE = "wan-mini.test"
VIDEO = Video(
    key="videos/x/1.mp4", bytes=10, sha256="ab", width=96, height=96, num_frames=17, fps=8
)
TIMINGS = StageTimings(
    queue_s=0.1, text_encoder_s=0.2, denoise_s=3, vae_s=0.4, mp4_s=0.1, total_s=3.8
)
FAILURE = Failure(code="out_of_device_memory", detail="The device ran out of memory.")


def create(store: JobStore, request: GenerationRequest) -> str:
    return store.create(request, QUEUE).job.id


def end(store: JobStore, attempt: Attempt, state: JobState) -> None:
    match state:
        case JobState.SUCCEEDED:
            store.succeed(attempt, VIDEO, TIMINGS)
        case JobState.FAILED:
            store.fail(attempt, FAILURE)
        case _:
            store.cancelled(attempt)


def expire_lease(redis: Redis, job_id: str) -> None:
    redis.hset(redis_keys.record(job_id), "lease_ms", 1)


ENDINGS = [JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED]


def test_created_job_is_recorded_indexed_and_queued(
    store: JobStore, redis: Redis, request_for_video: GenerationRequest
) -> None:
    job = store.create(request_for_video, QUEUE).job
    assert job.state is JobState.QUEUED
    assert store.get(job.id) == job
    assert [each.id for each in store.list().jobs] == [job.id]
    assert 0 < redis.ttl(redis_keys.record(job.id)) <= redis_keys.RECORD_TTL_S

    queue = Queue(QUEUE, connection=redis, serializer=JSONSerializer)
    assert queue.job_ids == [job.id]
    rq_job = Job.fetch(job.id, connection=redis, serializer=JSONSerializer)
    assert (rq_job.func_name, rq_job.args) == (TASK, [job.id])
    assert rq_job.timeout == timeout_s(request_for_video)
    assert rq_job.result_ttl == redis_keys.RQ_RESULT_TTL_S
    assert rq_job.failure_ttl == redis_keys.RQ_FAILURE_TTL_S


def test_what_rq_stores_is_json_and_holds_no_prompt(
    store: JobStore, redis: Redis, request_for_video: GenerationRequest
) -> None:
    job_id = create(store, request_for_video)
    fields = redis.hgetall(Job.key_for(job_id))
    assert all(request_for_video.prompt.encode() not in value for value in fields.values())
    rq_job = Job.fetch(job_id, connection=redis, serializer=JSONSerializer)
    assert json.loads(rq_job.data) == [TASK, None, [job_id], {}]


def test_attempt_from_claim_to_success(
    store: JobStore, request_for_video: GenerationRequest
) -> None:
    job_id = create(store, request_for_video)
    attempt = store.claim(job_id, "w")
    assert attempt.number == 1
    store.progress(attempt, Progress(stage=Stage.DENOISE, step=3, steps=20))
    running = store.get(job_id)
    assert running.state is JobState.RUNNING
    assert running.progress == Progress(stage=Stage.DENOISE, step=3, steps=20)
    assert running.started_at is not None
    assert running.started_at >= running.created_at

    store.succeed(attempt, VIDEO, TIMINGS)
    done = store.get(job_id)
    assert (done.state, done.video, done.timings) == (JobState.SUCCEEDED, VIDEO, TIMINGS)
    assert done.progress is None
    assert done.finished_at is not None
    assert done.finished_at >= running.started_at


def test_second_claim_makes_the_first_stale(
    store: JobStore, redis: Redis, request_for_video: GenerationRequest
) -> None:
    job_id = create(store, request_for_video)
    old = store.claim(job_id, "w")
    store.progress(old, Progress(stage=Stage.VAE, step=1, steps=2))
    expire_lease(redis, job_id)
    with pytest.raises(JobHeld, match="Attempt 1"):
        store.claim(job_id, "w")  # only recovery judges expired leases
    assert Recovery(redis).run() == {job_id: "queued"}
    new = store.claim(job_id, "w")
    assert new.number == 2
    assert store.get(job_id).progress is None
    with pytest.raises(StaleAttempt, match="Attempt 1 no longer owns"):
        store.progress(old, Progress(stage=Stage.VAE, step=2, steps=2))
    with pytest.raises(StaleAttempt):
        store.cancel_requested(old)
    for state in ENDINGS:
        with pytest.raises(StaleAttempt):
            end(store, old, state)
    assert store.cancel_requested(new) is False
    store.succeed(new, VIDEO, TIMINGS)
    assert store.get(job_id).state is JobState.SUCCEEDED


@pytest.mark.parametrize("last", ENDINGS)
def test_ended_job_never_changes(
    store: JobStore, request_for_video: GenerationRequest, last: JobState
) -> None:
    job_id = create(store, request_for_video)
    attempt = store.claim(job_id, "w")
    end(store, attempt, last)
    ended = store.get(job_id)
    assert last.is_terminal
    for other in ENDINGS:
        if other is not last:
            with pytest.raises(StaleAttempt, match=f"the record says {last}"):
                end(store, attempt, other)
    with pytest.raises(StaleAttempt):
        store.progress(attempt, Progress(stage=Stage.MP4, step=1, steps=1))
    with pytest.raises(StaleAttempt):
        store.cancel_requested(attempt)
    with pytest.raises(JobAlreadyFinished) as refused:
        store.claim(job_id, "w")
    assert refused.value.context["state"] == last
    assert store.get(job_id) == ended


def test_repeated_write_of_the_same_end_is_no_error(
    store: JobStore, request_for_video: GenerationRequest
) -> None:
    """After a lost response the client sends the script again."""
    attempt = store.claim(create(store, request_for_video), "w")
    store.succeed(attempt, VIDEO, TIMINGS)
    before = store.get(attempt.job_id)
    store.succeed(attempt, VIDEO, TIMINGS)
    assert store.get(attempt.job_id) == before


def test_repeated_progress_is_one_event(
    store: JobStore, redis: Redis, request_for_video: GenerationRequest
) -> None:
    attempt = store.claim(create(store, request_for_video), "w")
    for step in (1, 1, 2):
        store.progress(attempt, Progress(stage=Stage.VAE, step=step, steps=2))
    found = events.decode(redis.xrange(redis_keys.events(attempt.job_id)))
    assert [each.progress.step for each in found if each.progress] == [1, 2]


def test_a_claim_repeated_with_its_token_is_the_same_attempt_with_a_fresh_lease(
    store: JobStore, redis: Redis, request_for_video: GenerationRequest
) -> None:
    job_id, token = create(store, request_for_video), new_token()
    first = store.claim(job_id, "w", token)
    expire_lease(redis, job_id)
    assert store.claim(job_id, "w", token) == first
    assert Recovery(redis).run() == {}
    assert (store.get(job_id).attempts, store.get(job_id).lost) == (1, 0)


@pytest.mark.parametrize("last", [*ENDINGS, "lost"])
def test_the_rq_hash_of_an_ended_job_expires(
    store: JobStore,
    redis: Redis,
    request_for_video: GenerationRequest,
    last: JobState | Literal["lost"],
) -> None:
    """Also if no worker is left to report the end to RQ."""
    attempt = store.claim(create(store, request_for_video), "w")
    assert redis.ttl(Job.key_for(attempt.job_id)) == -1
    if isinstance(last, JobState):
        end(store, attempt, last)
    else:
        store.give_up(attempt)
        assert redis.ttl(Job.key_for(attempt.job_id)) == -1
        store.give_up(store.claim(attempt.job_id, "w"))
    assert 0 < redis.ttl(Job.key_for(attempt.job_id)) <= redis_keys.RQ_RESULT_TTL_S


def test_cancelling_a_queued_job_takes_it_out_of_the_queue(
    store: JobStore, redis: Redis, request_for_video: GenerationRequest
) -> None:
    kept = create(store, request_for_video)
    job_id = create(store, request_for_video)
    job = store.cancel(job_id)
    assert (job.state, job.cancel_requested) == (JobState.CANCELLED, True)
    assert job.finished_at is not None
    assert Queue(QUEUE, connection=redis).job_ids == [kept]
    assert not redis.exists(Job.key_for(job_id))
    with pytest.raises(JobAlreadyFinished):
        store.claim(job_id, "w")
    assert store.cancel(job_id) == job


def test_cancelling_what_a_worker_has_just_taken_leaves_rqs_hash(
    store: JobStore, redis: Redis, request_for_video: GenerationRequest
) -> None:
    job_id = create(store, request_for_video)
    queue = Queue(QUEUE, connection=redis)
    redis.lmove(queue.key, queue.intermediate_queue_key)
    assert store.cancel(job_id).state is JobState.CANCELLED
    assert 0 < redis.ttl(Job.key_for(job_id)) <= redis_keys.RQ_RESULT_TTL_S
    assert redis.llen(queue.intermediate_queue_key) == 0
    with pytest.raises(JobAlreadyFinished):
        store.claim(job_id, "w")


def test_cancelling_a_running_job_asks_its_worker(
    store: JobStore, request_for_video: GenerationRequest
) -> None:
    attempt = store.claim(create(store, request_for_video), "w")
    assert store.cancel_requested(attempt) is False
    job = store.cancel(attempt.job_id)
    assert (job.state, job.cancel_requested) == (JobState.RUNNING, True)
    assert store.cancel_requested(attempt) is True
    store.cancelled(attempt)
    assert store.get(attempt.job_id).state is JobState.CANCELLED


@pytest.mark.parametrize("running", [False, True])
def test_a_second_cancel_adds_no_event(
    redis: Redis, store: JobStore, request_for_video: GenerationRequest, running: bool
) -> None:
    job_id = store.create(request_for_video, QUEUE).job.id
    if running:
        store.claim(job_id, "w")
    stream = redis_keys.EVENTS_PREFIX + job_id
    before = redis.xlen(stream)
    first = store.cancel(job_id)
    assert redis.xlen(stream) == before + 1
    with redis.pubsub() as pubsub:
        pubsub.subscribe(redis_keys.EVENTS_CHANNEL)
        pubsub.get_message(timeout=5)
        assert store.cancel(job_id) == first
        assert redis.xlen(stream) == before + 1
        assert pubsub.get_message(timeout=0.2) is None, "no stream is woken for nothing"


def test_cancelled_job_of_a_lost_worker_is_not_run_again(
    store: JobStore, redis: Redis, request_for_video: GenerationRequest
) -> None:
    job_id = create(store, request_for_video)
    lost = store.claim(job_id, "w")
    store.cancel(job_id)
    expire_lease(redis, job_id)
    assert Recovery(redis).run() == {job_id: "cancelled"}
    with pytest.raises(JobAlreadyFinished):
        store.claim(job_id, "w")
    assert store.get(job_id).state is JobState.CANCELLED
    with pytest.raises(StaleAttempt):
        store.succeed(lost, VIDEO, TIMINGS)


@pytest.mark.parametrize("last", [JobState.SUCCEEDED, JobState.FAILED])
def test_ended_job_cannot_be_cancelled(
    store: JobStore, request_for_video: GenerationRequest, last: JobState
) -> None:
    attempt = store.claim(create(store, request_for_video), "w")
    end(store, attempt, last)
    with pytest.raises(JobNotCancellable, match=f"has already {last}"):
        store.cancel(attempt.job_id)


@pytest.mark.parametrize("job_id", ["", "nope", "a" * 65, "../x", "a b", "\ud800", "wan:job:x"])
def test_unknown_and_impossible_ids(store: JobStore, job_id: str) -> None:
    for call in (store.get, store.cancel, lambda name: store.claim(name, "w")):
        with pytest.raises(JobNotFound):
            call(job_id)


def test_state_table_is_what_the_scripts_allow(
    store: JobStore, request_for_video: GenerationRequest
) -> None:
    """For every pair of states, the scripts allow exactly the transitions of the table."""
    reached: dict[JobState, set[JobState]] = {state: set() for state in JobState}
    for start in JobState:
        for target in JobState:
            job_id = create(store, request_for_video)
            attempt = Attempt(job_id, 0, "none")
            if start is not JobState.QUEUED:
                attempt = store.claim(job_id, "w")
            if start.is_terminal:
                end(store, attempt, start)
            before = store.get(job_id)
            _try_to_reach(store, attempt, before.state, target)
            after = store.get(job_id)
            if after != before and not (after.state is start and target is not start):
                reached[start].add(after.state)
    assert reached == {state: set(targets) for state, targets in TRANSITIONS.items()}


def _try_to_reach(store: JobStore, attempt: Attempt, start: JobState, target: JobState) -> None:
    try:
        if target is JobState.RUNNING:
            store.claim(attempt.job_id, "w")
        elif target is JobState.QUEUED:
            store.release(attempt)
        elif target is JobState.CANCELLED and start is not JobState.RUNNING:
            store.cancel(attempt.job_id)
        elif target.is_terminal:
            end(store, attempt, target)
    except (StaleAttempt, JobAlreadyFinished, JobHeld, JobNotCancellable):
        pass


def test_list_is_newest_first_and_pages_cover_everything_once(
    store: JobStore, request_for_video: GenerationRequest
) -> None:
    ids = [create(store, request_for_video) for _ in range(7)]
    newest_first = sorted(ids, reverse=True)
    seen: list[str] = []
    cursor = None
    sizes = []
    while True:
        page = store.list(limit=3, cursor=cursor)
        sizes.append(len(page.jobs))
        seen += [job.id for job in page.jobs]
        cursor = page.next_cursor
        if cursor is None:
            break
    assert seen == newest_first
    assert sizes == [3, 3, 1]


def test_new_jobs_do_not_shift_a_page(
    store: JobStore, request_for_video: GenerationRequest
) -> None:
    ids = sorted(create(store, request_for_video) for _ in range(4))
    first = store.list(limit=2)
    create(store, request_for_video)
    second = store.list(limit=2, cursor=first.next_cursor)
    assert {job.id for job in (*first.jobs, *second.jobs)} == set(ids)


def test_list_oldest_first_has_the_same_pages_backwards(
    store: JobStore, request_for_video: GenerationRequest
) -> None:
    created = sorted(create(store, request_for_video) for _ in range(5))
    first = store.list(limit=3, oldest_first=True)
    assert [job.id for job in first.jobs] == created[:3]
    second = store.list(limit=3, cursor=first.next_cursor, oldest_first=True)
    assert [job.id for job in second.jobs] == created[3:]
    assert second.next_cursor is None


def test_list_by_state_follows_the_jobs(
    store: JobStore, request_for_video: GenerationRequest
) -> None:
    queued, running, done = (create(store, request_for_video) for _ in range(3))
    store.claim(running, "w")
    end(store, store.claim(done, "w"), JobState.SUCCEEDED)
    by_state = {state: [job.id for job in store.list(state=state).jobs] for state in JobState}
    assert by_state == {
        JobState.QUEUED: [queued],
        JobState.RUNNING: [running],
        JobState.SUCCEEDED: [done],
        JobState.FAILED: [],
        JobState.CANCELLED: [],
    }


def test_exact_last_page_has_no_cursor(
    store: JobStore, request_for_video: GenerationRequest
) -> None:
    for _ in range(2):
        create(store, request_for_video)
    assert store.list(limit=2).next_cursor is None
    assert store.list(limit=1).next_cursor is not None


def test_unreadable_record_is_left_out_of_lists_and_pages_go_on(
    store: JobStore,
    redis: Redis,
    request_for_video: GenerationRequest,
    caplog: pytest.LogCaptureFixture,
) -> None:
    oldest, broken, newest = sorted(create(store, request_for_video) for _ in range(3))
    redis.hset(redis_keys.record(broken), "request", '{"prompt": "a secret prompt"}')
    assert [job.id for job in store.list().jobs] == [newest, oldest]
    assert broken in caplog.text
    assert "a secret prompt" not in caplog.text
    first = store.list(limit=2)
    assert [job.id for job in first.jobs] == [newest]
    assert [job.id for job in store.list(limit=2, cursor=first.next_cursor).jobs] == [oldest]
    assert store.list(state=JobState.QUEUED, limit=1).next_cursor is not None


def make_unreadable(redis: Redis, store: JobStore, request: GenerationRequest, many: int) -> None:
    """Create records that this version cannot read, half of them of another format."""
    for number in range(many):
        name = redis_keys.record(create(store, request))
        redis.hset(name, *(("format", "2") if number % 2 else ("attempts", "many")))


def test_thousands_of_unreadable_records_do_not_slow_a_list(
    store: JobStore,
    redis: Redis,
    request_for_video: GenerationRequest,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Found in a few round trips, where each empty page cost the caller two."""
    oldest = create(store, request_for_video)
    middle = create(store, request_for_video)
    make_unreadable(redis, store, request_for_video, 3000)
    newest = create(store, request_for_video)

    def reads() -> int:
        stats = redis.info("commandstats")
        return sum(stats.get(f"cmdstat_{name}", {"calls": 0})["calls"] for name in READS)

    READS = ("zrevrangebylex", "hgetall")
    redis.config_resetstat()
    first = store.list(limit=1)
    assert [job.id for job in first.jobs] == [newest]
    second = store.list(limit=1, cursor=first.next_cursor)
    assert [job.id for job in second.jobs] == [middle]
    assert reads() <= 3000 + 10
    ranges = redis.info("commandstats")["cmdstat_zrevrangebylex"]["calls"]
    assert ranges <= 1 + 2 + 3000 // SKIP_PAGE
    assert caplog.text.count("Left out of a list") <= ranges

    caplog.clear()
    redis.config_resetstat()
    both = store.list(limit=2, cursor=first.next_cursor)
    assert [job.id for job in both.jobs] == [middle, oldest]
    assert both.next_cursor is None
    assert reads() <= 10, "what was unreadable a moment ago is not read again"
    assert caplog.text == ""


def test_a_page_after_unreadable_records_is_no_longer_than_asked_for(
    store: JobStore, redis: Redis, request_for_video: GenerationRequest
) -> None:
    known = [create(store, request_for_video) for _ in range(5)]
    make_unreadable(redis, store, request_for_video, 3)
    pages, cursor = [], None
    while True:
        page = store.list(limit=2, cursor=cursor)
        pages.append([job.id for job in page.jobs])
        cursor = page.next_cursor
        if cursor is None:
            break
    assert max(map(len, pages)) == 2
    assert [each for page in pages for each in page] == known[::-1]
    assert store.list(limit=5, oldest_first=True).jobs[0].id == known[0]


def test_only_unreadable_records_end_in_an_empty_last_page(
    store: JobStore, redis: Redis, request_for_video: GenerationRequest
) -> None:
    make_unreadable(redis, store, request_for_video, 5)
    page = store.list(limit=2)
    assert (page.jobs, page.next_cursor) == ((), None)


def test_a_repaired_record_is_listed_again(
    store: JobStore,
    redis: Redis,
    request_for_video: GenerationRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job_id = create(store, request_for_video)
    redis.hset(redis_keys.record(job_id), "attempts", "many")
    monkeypatch.setattr("jobs.store.listing.SKIPPED_S", 0)
    assert store.list().jobs == ()
    redis.hset(redis_keys.record(job_id), "attempts", "0")
    assert [job.id for job in store.list().jobs] == [job_id]


def test_a_record_of_the_next_version_is_read_changed_and_keeps_its_new_fields(
    store: JobStore, redis: Redis, request_for_video: GenerationRequest
) -> None:
    """One field more, in the hash and in each part of it."""
    job_id = create(store, request_for_video)
    name = redis_keys.record(job_id)
    request = json.loads(redis.hget(name, "request") or b"") | {"looped": True}
    redis.hset(name, mapping={"surprise": b"\xff1", "request": json.dumps(request)})
    assert store.get(job_id).request == request_for_video
    attempt = store.claim(job_id, "w")
    progress = {"stage": "vae", "step": 1, "steps": 2, "layer": 3}
    redis.hset(name, "progress", json.dumps(progress))
    assert store.get(job_id).progress == Progress(stage=Stage.VAE, step=1, steps=2)
    end(store, attempt, JobState.SUCCEEDED)
    video = json.loads(redis.hget(name, "video") or b"") | {"preview": {"key": "k", "loops": 1}}
    redis.hset(name, "video", json.dumps(video))
    job = store.get(job_id)
    assert job.state is JobState.SUCCEEDED
    assert [each.id for each in store.list().jobs] == [job_id]
    assert redis.hget(name, "surprise") == b"\xff1"
    assert json.loads(redis.hget(name, "request") or b"")["looped"] is True


def test_a_job_of_another_format_is_not_claimed(
    store: JobStore, redis: Redis, request_for_video: GenerationRequest
) -> None:
    job_id = create(store, request_for_video)
    redis.hset(redis_keys.record(job_id), "format", "2")
    before = redis.hgetall(redis_keys.record(job_id))
    with pytest.raises(RecordUnreadable, match="has the format '2'"):
        store.claim(job_id, "w")
    assert redis.hgetall(redis_keys.record(job_id)) == before


def test_cancelling_an_unreadable_job_changes_nothing(
    store: JobStore, redis: Redis, request_for_video: GenerationRequest
) -> None:
    job_id = create(store, request_for_video)
    redis.hset(redis_keys.record(job_id), "request", "{not json")
    before = redis.hgetall(redis_keys.record(job_id))
    with pytest.raises(RecordUnreadable, match=job_id):
        store.cancel(job_id)
    assert redis.hgetall(redis_keys.record(job_id)) == before
    assert Queue(QUEUE, connection=redis, serializer=JSONSerializer).job_ids == [job_id]


@pytest.mark.parametrize("limit", [0, -1, MAX_PAGE + 1])
def test_list_limit_is_bounded(store: JobStore, limit: int) -> None:
    with pytest.raises(InvalidSpec) as refused:
        store.list(limit=limit)
    assert refused.value.violations[0].field == "limit"


@pytest.mark.parametrize("cursor", ["", "c", "x1", "c../x", "c" + "a" * 65, "c\ud800"])
def test_foreign_cursor_is_refused(store: JobStore, cursor: str) -> None:
    with pytest.raises(InvalidSpec) as refused:
        store.list(cursor=cursor)
    assert refused.value.violations[0].field == "cursor"


def test_expired_records_leave_the_list(store: JobStore, redis: Redis) -> None:
    """At once; the next retention round removes their ids from the indexes."""
    ancient = "000000000001" + "0" * 20
    for index in (redis_keys.index("all"), redis_keys.index("succeeded")):
        redis.zadd(index, {ancient: 0})
    assert store.list().jobs == ()
    assert store.list(state=JobState.SUCCEEDED).jobs == ()


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("state", b"paused", "state"),
        ("request", b"{not json", "JSONDecodeError"),
        ("request", b'{"prompt": "a secret prompt"}', "request.mode"),
        ("attempts", b"many", "attempts"),
        ("queue", b"\xff", "UnicodeDecodeError"),
        ("format", b"2", "has the format '2', and this version reads 1"),
        ("format", b"\xff", "has the format"),
    ],
)
def test_unreadable_record_is_named_and_shows_no_values(
    store: JobStore,
    redis: Redis,
    request_for_video: GenerationRequest,
    field: str,
    value: bytes,
    named: str,
) -> None:
    job_id = create(store, request_for_video)
    redis.hset(redis_keys.record(job_id), field, value)
    with pytest.raises(RecordUnreadable, match=job_id) as refused:
        store.get(job_id)
    assert named in refused.value.detail
    assert "a secret prompt" not in str(refused.value) + str(refused.value.__cause__)
