"""Test `POST /generate`: what is queued, and what is refused with nothing queued."""

import json
import re
from collections.abc import Iterator
from typing import Any, cast

import pytest
from fastapi.testclient import TestClient
from redis import Redis

from jobs import catalog, redis_keys
from jobs.catalog import WorkerOffer
from jobs.spec import MAX_SEED
from jobs.state import JobState
from jobs.store.job_store import JobStore
from service.app import MAX_BODY_BYTES, create_app
from service.settings import ServiceSettings

PROMPT = "a small red circle moving right"


def enqueued(redis: Redis) -> list[bytes]:
    """List the Redis keys that a queued job would have made."""
    return [
        cast("bytes", key)
        for pattern in ("rq:*", redis_keys.record("*"), "wan:jobs:*")
        for key in redis.keys(pattern)
    ]


@pytest.fixture
def nothing_enqueued(redis: Redis) -> Iterator[None]:
    """Assert, after the test, that Redis holds no trace of a job."""
    yield
    assert enqueued(redis) == []


def refused(client: TestClient, body: object, status: int) -> Any:
    # json.dumps escapes lone surrogates, which the client's own encoder would refuse.
    headers = {"content-type": "application/json"}
    return problem_of(client.post("/generate", content=json.dumps(body), headers=headers), status)


def problem_of(answer: Any, status: int) -> Any:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert problem["status"] == status
    assert {"type", "title", "detail", "instance", "code"} <= set(problem)
    return problem


def test_accepted_request_is_queued(
    client: TestClient, live_worker: WorkerOffer, store: JobStore, redis: Redis
) -> None:
    answer = client.post("/generate", json={"prompt": PROMPT, "mode": "w8a8", "seed": 7})
    assert answer.status_code == 202
    job = answer.json()
    assert answer.headers["location"] == f"/jobs/{job['id']}"
    assert client.get(answer.headers["location"]).json() == job
    assert job["state"] == "queued"
    assert job["request"]["mode"] == "w8a8"
    assert job["request"]["seed"] == 7
    assert job["request"]["num_frames"] == 17
    assert job["video"] is None
    assert redis.lrange(f"rq:queue:{live_worker.queue}", 0, -1) == [job["id"].encode()]
    assert store.get(job["id"]).state is JobState.QUEUED
    assert job["queue"] == {"position": 0, "starts_in_s": 0}


BAD = [
    ("prompt", "", "visible character"),
    ("prompt", " \n\t ", "visible character"),
    ("prompt", "&nbsp;", "visible character, once HTML entities are read"),
    ("prompt", "&#8203;", "visible character, once HTML entities are read"),
    ("prompt", "\u200b\ufeff", "visible character"),
    ("prompt", "x" * 201, "at most 200 characters"),
    ("prompt", "nul \x00", "control characters"),
    ("prompt", "half \ud83d", "control characters"),
    ("prompt", 7, "text"),
    ("negative_prompt", "x" * 201, "at most 200 characters"),
    ("mode", "int4", "one of bf16, w8a8"),
    ("mode", "W8A8", "one of bf16, w8a8"),
    ("size", "100x100", "one of 96x96, 64x96"),
    ("size", "large", "one of 96x96, 64x96"),
    ("num_frames", 16, "4k+1 from 5 to 17"),
    ("num_frames", 21, "4k+1 from 5 to 17"),
    ("num_frames", 17.5, "4k+1"),
    ("num_inference_steps", 0, "1 to 50"),
    ("num_inference_steps", 51, "1 to 50"),
    ("guidance_scale", 0.9, "1 to 20"),
    ("guidance_scale", 21, "1 to 20"),
    ("seed", -1, "0 to 9223372036854775807"),
    ("seed", MAX_SEED + 1, "0 to 9223372036854775807"),
    ("model", "wan-13b", "one of wan-mini"),
    ("frames", 17, "fields prompt"),
]


@pytest.mark.usefixtures("live_worker", "nothing_enqueued")
@pytest.mark.parametrize(("field", "value", "bound"), BAD, ids=lambda v: ascii(v)[:24])
def test_each_bound_is_named(client: TestClient, field: str, value: object, bound: str) -> None:
    problem = refused(client, {"prompt": PROMPT, field: value}, 422)
    assert problem["code"] == "invalid_spec"
    (error,) = problem["errors"]
    assert error["field"] == field
    assert bound in error["bound"]
    assert error["detail"] in problem["detail"]
    text = ascii(value).strip("'")[:40]
    assert text in ascii(error["value"]).replace("\\\\", "\\")


@pytest.mark.usefixtures("live_worker", "nothing_enqueued")
def test_all_failures_come_in_one_answer(client: TestClient) -> None:
    bad = {"prompt": "", "num_frames": 4, "seed": -1, "mode": "int4", "extra": None}
    problem = refused(client, bad, 422)
    assert sorted(error["field"] for error in problem["errors"]) == sorted(bad)


@pytest.mark.usefixtures("live_worker")
def test_location_is_where_callers_find_it(settings: ServiceSettings) -> None:
    behind = settings.model_copy(update={"public_url": "http://testserver/video"})
    with TestClient(create_app(behind)) as client:
        answer = client.post("/generate", json={"prompt": PROMPT})
    assert answer.headers["location"] == f"/video/jobs/{answer.json()['id']}"


@pytest.mark.usefixtures("live_worker", "nothing_enqueued")
def test_names_beyond_the_twentieth_that_is_no_field_are_counted(client: TestClient) -> None:
    many = {f"{number:x}": 1 for number in range(20_000)}
    problem = refused(client, many | {"prompt": "a", "seed": -1}, 422)
    fields = [error["field"] for error in problem["errors"]]
    assert sorted(fields) == sorted(["seed", *list(many)[:20], "body"])
    assert "19980 more names are not fields" in problem["detail"]
    assert len(json.dumps(problem)) < 30_000


@pytest.mark.usefixtures("live_worker", "nothing_enqueued")
def test_missing_prompt_is_named_with_a_null_value(client: TestClient) -> None:
    (error,) = refused(client, {}, 422)["errors"]
    assert (error["field"], error["value"]) == ("prompt", None)


@pytest.mark.usefixtures("live_worker", "nothing_enqueued")
@pytest.mark.parametrize("body", [[], "text", 5, [{"prompt": "x"}]])
def test_body_that_is_no_object(client: TestClient, body: object) -> None:
    (error,) = refused(client, body, 422)["errors"]
    assert error["field"] == "body"


@pytest.mark.usefixtures("live_worker", "nothing_enqueued")
@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"", 422),
        (b"null", 422),
        (b"{", 422),
        (b'{"prompt": "\xff"}', 400),
        (b'{"prompt": "x", "guidance_scale": NaN}', 422),
        (b"[" * 100_000, 400),
        (b'{"prompt": "' + b"x" * MAX_BODY_BYTES + b'"}', 413),
    ],
    ids=["empty", "null", "cut", "not-utf8", "nan", "deep", "too-large"],
)
def test_unreadable_bodies(client: TestClient, content: bytes, status: int) -> None:
    answer = client.post("/generate", content=content, headers={"content-type": "application/json"})
    problem_of(answer, status)


@pytest.mark.usefixtures("live_worker", "nothing_enqueued")
@pytest.mark.parametrize(
    ("field", "bound"),
    [
        ("seed", "a whole number from 0 to 9223372036854775807"),
        ("num_frames", "4k+1"),
        ("guidance_scale", "1 to 20"),
        ("prompt", "text"),
    ],
)
def test_a_number_of_thousands_of_digits_is_named(
    client: TestClient, field: str, bound: str
) -> None:
    content = json.dumps({"prompt": PROMPT, field: 0}).replace("0}", "9" * 5000 + "}")
    answer = client.post("/generate", content=content, headers={"content-type": "application/json"})
    (error,) = problem_of(answer, 422)["errors"]
    assert error["field"] == field
    assert error["value"] == "9" * 80 + "… (5000 characters)"
    assert bound in error["bound"]


@pytest.mark.usefixtures("live_worker", "nothing_enqueued")
def test_broken_json_says_where(client: TestClient) -> None:
    answer = client.post(
        "/generate", content='{"prompt": "x",}', headers={"content-type": "application/json"}
    )
    (error,) = problem_of(answer, 422)["errors"]
    assert (error["field"], error["value"], error["bound"]) == ("body", None, "a JSON object")
    assert re.match(r"The body is not JSON: .+ at character 1\d\.$", error["detail"])


@pytest.mark.usefixtures("live_worker")
@pytest.mark.parametrize(
    "content_type", ["application/json; charset=utf-8", "Application/JSON", "application/x+json"]
)
def test_json_by_any_of_its_names_is_read(client: TestClient, content_type: str) -> None:
    answer = client.post(
        "/generate", content=b'{"prompt": "x"}', headers={"content-type": content_type}
    )
    assert answer.status_code == 202


@pytest.mark.usefixtures("live_worker", "nothing_enqueued")
def test_streamed_body_is_limited_too(client: TestClient) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(MAX_BODY_BYTES // 1024 + 1):
            yield b"x" * 1024

    answer = client.post(
        "/generate", content=chunks(), headers={"content-type": "application/json"}
    )
    assert problem_of(answer, 413)["code"] == "body_too_large"


@pytest.mark.usefixtures("live_worker", "nothing_enqueued")
@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", None])
def test_other_content_types_get_the_remedy(client: TestClient, content_type: str | None) -> None:
    headers = {} if content_type is None else {"content-type": content_type}
    answer = client.post("/generate", content=b'{"prompt": "x"}', headers=headers)
    problem = problem_of(answer, 415)
    assert problem["code"] == "unsupported_media_type"
    assert "Content-Type: application/json" in problem["detail"]


@pytest.mark.usefixtures("live_worker", "nothing_enqueued")
@pytest.mark.parametrize("encoding", ["gzip", "br", "identity, gzip"])
def test_encoded_bodies_get_the_remedy(client: TestClient, encoding: str) -> None:
    headers = {"content-type": "application/json", "content-encoding": encoding}
    answer = client.post("/generate", content=b'{"prompt": "x"}', headers=headers)
    assert "without Content-Encoding" in problem_of(answer, 415)["detail"]
    assert answer.headers["accept-encoding"] == "identity"


@pytest.mark.usefixtures("live_worker", "nothing_enqueued")
@pytest.mark.parametrize(
    ("content", "field", "detail"),
    [
        ('{"prompt": "x", "seed": 1, "seed": 2}', "seed", "seed is given twice; give it once."),
        ('{"prompt": "x", "prompt": "x"}', "prompt", "prompt is given twice; give it once."),
        ('{"prompt": "x", "a": {"b": 1, "b": 1}}', "b", "b is given twice; give it once."),
        ('{"prompt": "x", "guidance_scale": NaN}', "body", "NaN is no number in JSON"),
        ('{"prompt": "x", "seed": -Infinity}', "body", "-Infinity is no number in JSON"),
        ('{"prompt": "\t"}', "body", "Invalid control character at character 12."),
        ('{"prompt": "x", "guidance_scale": 1e999}', "guidance_scale", "which is not a number"),
    ],
)
def test_json_that_readers_disagree_on(
    client: TestClient, content: str, field: str, detail: str
) -> None:
    headers = {"content-type": "application/json"}
    answer = client.post("/generate", content=content, headers=headers)
    (error,) = problem_of(answer, 422)["errors"]
    assert error["field"] == field
    assert detail in error["detail"]


def test_known_mode_without_a_live_worker(
    client: TestClient, redis: Redis, live_worker: WorkerOffer
) -> None:
    bf16 = live_worker.modes[:1]
    catalog.withdraw(redis, live_worker.worker_id)
    other = {"worker_id": "worker-2", "modes": bf16, "queue": "wan-mini.other"}
    catalog.publish(redis, live_worker.model_copy(update=other))
    answer = client.post("/generate", json={"prompt": PROMPT, "mode": "w8a8"})
    problem = problem_of(answer, 503)
    assert problem["code"] == "mode_not_served"
    assert problem["served"] == [{"model": "wan-mini", "modes": ["bf16"]}]
    assert answer.headers["retry-after"] == "5"
    assert enqueued(redis) == []


@pytest.mark.parametrize(
    ("mode", "status"), [(None, 503), ("bf16", 503), ("w8a8", 503), ("int4", 422), ("No!", 422)]
)
@pytest.mark.usefixtures("nothing_enqueued")
def test_no_live_worker(
    client: TestClient, redis: Redis, live_worker: WorkerOffer, mode: str | None, status: int
) -> None:
    """Modes offered within 30 days are down; others are wrong."""
    catalog.withdraw(redis, live_worker.worker_id)
    body = {"prompt": PROMPT} | ({} if mode is None else {"mode": mode})
    problem = problem_of(client.post("/generate", json=body), status)
    assert problem["code"] == ("mode_not_served" if status == 503 else "invalid_spec")


@pytest.mark.usefixtures("nothing_enqueued")
def test_nobody_has_ever_offered_anything(client: TestClient) -> None:
    problem = refused(client, {"prompt": PROMPT, "mode": "bf16"}, 503)
    assert problem["served"] == []
