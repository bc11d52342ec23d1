"""Test `GET /workers`: the state of live workers and of their queues."""

from fastapi.testclient import TestClient
from redis import Redis

from jobs import catalog, redis_keys
from jobs.catalog import WorkerOffer
from jobs.spec import GenerationRequest
from jobs.store.job_store import JobStore
from jobs.store.workers import ModeStatus, WorkerStatus, publish_status, read_statuses


def test_no_worker_is_no_error(client: TestClient) -> None:
    assert client.get("/workers").json() == {"workers": [], "queues": []}


def test_workers_are_shown_with_what_they_say_of_themselves(
    client: TestClient, redis: Redis, live_worker: WorkerOffer
) -> None:
    publish_status(
        redis,
        WorkerStatus(
            worker_id=live_worker.worker_id,
            state="busy",
            job_id="01a2",
            jobs_done=7,
            memory_allocated_bytes=3,
            memory_peak_bytes=4,
            memory_total_bytes=5,
            modes={
                "w8a8": ModeStatus(
                    step_s=0.2,
                    saturated_share=0.001,
                    flushed_share=0.02,
                    attention_density=0.25,
                    attention_mass=0.875,
                )
            },
        ),
    )
    (worker,) = client.get("/workers").json()["workers"]
    assert worker.pop("started_at")
    assert worker.pop("seen_at")
    assert worker == {
        "id": live_worker.worker_id,
        "model": "wan-mini",
        "device": "cpu",
        "queue": live_worker.queue,
        "modes": {
            "bf16": {
                "kernels": "cuda",
                "warning": None,
                "step_s": None,
                "saturated_share": None,
                "flushed_share": None,
                "attention_density": None,
                "attention_mass": None,
            },
            "w8a8": {
                "kernels": "eager",
                "warning": "This card has no FP8 tensor cores.",
                "step_s": 0.2,
                "saturated_share": 0.001,
                "flushed_share": 0.02,
                "attention_density": 0.25,
                "attention_mass": 0.875,
            },
        },
        "state": "busy",
        "fault": None,
        "drain": None,
        "job_id": "01a2",
        "job": None,
        "jobs_done": 7,
        "memory_allocated_bytes": 3,
        "memory_peak_bytes": 4,
        "memory_total_bytes": 5,
    }


def test_a_silent_worker_is_shown_as_such(client: TestClient, live_worker: WorkerOffer) -> None:
    (worker,) = client.get("/workers").json()["workers"]
    assert (worker["id"], worker["state"]) == (live_worker.worker_id, "unknown")
    assert worker["jobs_done"] is None


def test_queues_are_shown_also_those_that_nobody_serves(
    client: TestClient,
    store: JobStore,
    live_worker: WorkerOffer,
    request_for_video: GenerationRequest,
) -> None:
    for _ in range(2):
        store.create(request_for_video, "gone.0123456789ab")
    gone, served = client.get("/workers").json()["queues"]
    assert 0 <= gone.pop("oldest_age_s") < 60
    assert [each["waiting"] for each in gone.pop("shapes")] == [2]
    assert gone == {"name": "gone.0123456789ab", "model": "gone", "waiting": 2, "workers": 0}
    assert served == {
        "name": live_worker.queue,
        "model": "wan-mini",
        "waiting": 0,
        "oldest_age_s": 0,
        "workers": 1,
        "shapes": [],
    }


def test_a_waiting_job_is_looked_up_once(
    client: TestClient, redis: Redis, store: JobStore, request_for_video: GenerationRequest
) -> None:
    """`/ops` asks every few seconds, and 10,000 jobs may wait."""
    queue = "gone.0123456789ab"
    for _ in range(20):
        store.create(request_for_video, queue)

    def look() -> tuple[int, int]:
        """Return how many jobs wait, and how many fields were read of single records."""
        before = redis.info("commandstats").get("cmdstat_hget", {"calls": 0})["calls"]
        (gone,) = client.get("/workers").json()["queues"]
        read = redis.info("commandstats").get("cmdstat_hget", {"calls": 0})["calls"] - before
        return sum(each["waiting"] for each in gone["shapes"]), read

    first, again = look(), look()
    assert first[0] == again[0] == 20
    assert first[1] - again[1] == 20
    other = request_for_video.model_copy(update={"mode": "w8a8"})
    store.create(other, queue)
    (gone,) = client.get("/workers").json()["queues"]
    assert {each["mode"]: each["waiting"] for each in gone["shapes"]} == {"bf16": 20, "w8a8": 1}


def test_a_worker_that_ends_its_last_job_is_still_shown(
    client: TestClient, redis: Redis, live_worker: WorkerOffer
) -> None:
    name = "wan-mini.0123456789ab"
    publish_status(redis, WorkerStatus(worker_id=name, state="draining", job_id="01a2"))
    answer = client.get("/workers").json()
    ending, live = answer["workers"]
    assert (ending["id"], ending["model"], ending["state"]) == (name, "wan-mini", "draining")
    assert (ending["job_id"], ending["queue"]) == ("01a2", None)
    assert live["id"] == live_worker.worker_id
    (queue,) = answer["queues"]
    assert queue["workers"] == 1, "it takes nothing more from its queue"
    metrics = client.get("/metrics").text
    assert 'wan_workers{model="wan-mini",state="draining"} 1.0' in metrics


def test_a_worker_that_is_out_of_service_is_shown_with_its_fault(
    client: TestClient, redis: Redis, live_worker: WorkerOffer
) -> None:
    reason, name = "ffmpeg ended with status 1: it said nothing.", "wan-mini.0123456789ab"
    ready = client.get("/readyz").json()
    assert "faults" not in ready
    unfit = WorkerStatus(worker_id=name, state="degraded", fault=reason)
    publish_status(redis, unfit)
    assert read_statuses(redis) == (unfit,)
    degraded, _ = client.get("/workers").json()["workers"]
    assert (degraded["id"], degraded["state"]) == (name, "degraded")
    assert degraded["fault"] == reason
    metrics = client.get("/metrics").text
    assert 'wan_workers{model="wan-mini",state="degraded"} 1.0' in metrics
    more = {"degraded": ready["degraded"] + 1, "faults": [reason]}
    assert client.get("/readyz").json() == ready | more
    catalog.withdraw(redis, live_worker.worker_id)
    answer = client.get("/readyz")
    assert (answer.status_code, answer.json()["code"]) == (503, "no_live_worker")
    assert reason in answer.json()["detail"]


def test_a_status_without_a_fault_can_be_read_by_a_service_of_before(redis: Redis) -> None:
    publish_status(redis, WorkerStatus(worker_id="w", state="idle"))
    assert b"fault" not in (redis.get(redis_keys.worker_status("w")) or b"")
