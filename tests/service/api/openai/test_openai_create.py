"""Test `POST /v1/videos`: what the fields mean, as JSON and as a form, and what is refused."""

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import httpx2
import pytest
from fastapi.testclient import TestClient
from redis import Redis

from jobs import catalog
from jobs.catalog import ModelOffer, ModeOffer, WorkerOffer
from jobs.durations import Durations, measure
from jobs.store.job_store import JobStore
from service.app import create_app
from service.settings import ServiceSettings

PROMPT = "a small red circle"

Create = Callable[..., httpx2.Response]


@pytest.fixture(params=["json", "form"])
def create(request: pytest.FixtureRequest, client: TestClient, live_worker: WorkerOffer) -> Create:
    """Send fields, as JSON or as a form."""

    def send(**fields: Any) -> httpx2.Response:
        if request.param == "json":
            return client.post("/v1/videos", json=fields)
        parts = {name: (None, str(value)) for name, value in fields.items()}
        return client.post("/v1/videos", files=parts)

    return send


def refusal(answer: httpx2.Response) -> dict[str, Any]:
    """Return the error of an answer, after checking that it is a 400 in OpenAI's format."""
    assert answer.status_code == 400, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert list(answer.json()) == ["error"]
    error: dict[str, Any] = answer.json()["error"]
    assert list(error) == ["message", "type", "param", "code"]
    assert error["type"] == "invalid_request_error"
    return error


def test_a_prompt_is_enough(create: Create, store: JobStore) -> None:
    answer = create(prompt=PROMPT)
    assert answer.status_code == 200
    video = answer.json()
    job = store.get(video["id"])
    assert job.request.model_dump() == {
        "prompt": PROMPT,
        "negative_prompt": "blurry",
        "mode": "bf16",
        "size": "96x96",
        "num_frames": 17,
        "num_inference_steps": 20,
        "guidance_scale": 4.0,
        "seed": job.request.seed,
        "model": "wan-mini",
    }
    assert video == {
        "id": job.id,
        "object": "video",
        "model": "wan-mini:bf16",
        "status": "queued",
        "progress": 0,
        "created_at": int(job.created_at.timestamp()),
        "completed_at": None,
        "expires_at": None,
        "size": "96x96",
        "seconds": "2",
        "prompt": PROMPT,
        "error": None,
        "remixed_from_video_id": None,
        "mode": "bf16",
        "negative_prompt": "blurry",
        "seed": job.request.seed,
        "num_frames": 17,
        "num_inference_steps": 20,
        "guidance_scale": 4.0,
        "queue_position": 0,
        "seconds_left": None,
        "notes": [],
    }
    assert answer.headers["openai-poll-after-ms"] == "1000"


def test_every_field_arrives(create: Create, store: JobStore) -> None:
    fields = {
        "prompt": "ein grüner Kreis, 一个红色的圆",
        "model": "wan-mini:w8a8",
        "seconds": "0.5",
        "size": "64x96",
        "negative_prompt": "",
        "seed": 4294967295,
        "num_inference_steps": 3,
        "guidance_scale": 1.5,
    }
    answer = create(**fields)
    assert answer.status_code == 200, answer.text
    assert {name: answer.json()[name] for name in fields} == fields
    assert answer.json()["num_frames"] == 5


@pytest.mark.parametrize(
    ("name", "mode"),
    [("w8a8", "w8a8"), ("bf16", "bf16"), ("wan-mini", "bf16"), ("wan-mini:w8a8", "w8a8")],
)
def test_model_picks_the_mode(create: Create, name: str, mode: str) -> None:
    assert create(prompt=PROMPT, model=name).json()["mode"] == mode


@pytest.mark.parametrize("name", ["sora-2", "wan-mini:int8", "", ":", "w8a8:wan-mini", "💥", 7])
def test_an_unknown_model_is_answered_with_what_is_served(create: Create, name: object) -> None:
    error = refusal(create(prompt=PROMPT, model=name))
    assert error["param"] == "model"
    assert "use one of wan-mini:bf16, wan-mini:w8a8, or leave it out." in error["message"]


@pytest.mark.parametrize("seconds", ["2", "2.0", 2, 2.0, "002"], ids=repr)
def test_seconds_are_frames(create: Create, seconds: object) -> None:
    assert create(prompt=PROMPT, seconds=seconds).json()["num_frames"] == 17


@pytest.mark.parametrize(
    "seconds", ["5", "0", "0.4", "1.9", "-1", "", "x", "1e0", "inf", "nan", "２", "9" * 5000, True]
)
def test_other_seconds_are_refused_with_the_bounds(create: Create, seconds: object) -> None:
    error = refusal(create(prompt=PROMPT, seconds=seconds))
    assert error["param"] == "seconds"
    assert "which is not a multiple of 0.5 from 0.5 to 2." in error["message"]


def test_five_seconds_of_wan_are_81_frames(client: TestClient, redis: Redis) -> None:
    modes = (ModeOffer(name="bf16", description="as trained"),)
    wan = ModelOffer(
        name="wan2.1-t2v-14b",
        fingerprint="sha256:00",
        sizes=("832x480",),
        default_size="832x480",
        min_frames=5,
        max_frames=81,
        default_frames=81,
        fps=16,
        max_steps=100,
        default_steps=50,
        default_guidance_scale=5.0,
        default_mode="bf16",
        max_prompt_chars=2000,
    )
    queue = catalog.queue_name(wan, modes)
    offer = WorkerOffer(
        worker_id="w", queue=queue, device="npu", model=wan, modes=modes,
        started_at=datetime.now(UTC),
    )  # fmt: skip
    catalog.publish(redis, offer)
    video = client.post("/v1/videos", json={"prompt": PROMPT, "seconds": "5"}).json()
    assert (video["num_frames"], video["seconds"]) == (81, "5")
    for seconds in ("1.3", "5.25"):
        error = refusal(client.post("/v1/videos", json={"prompt": PROMPT, "seconds": seconds}))
        assert "a multiple of 0.25 from 0.25 to 5" in error["message"]


def test_seconds_and_frames_together_are_refused(create: Create) -> None:
    error = refusal(create(prompt=PROMPT, seconds="2", num_frames=17))
    assert (error["param"], error["message"]) == (
        "seconds",
        "seconds and num_frames say the same thing; give one of them.",
    )
    assert create(prompt=PROMPT, num_frames=9).json()["seconds"] == "1"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("seed", each) for each in ("7.0", "x", "", "-1", str(2**63), " 7", "7_0", "9" * 5000)),
        *(("num_inference_steps", each) for each in ("0", "51", "1.5", "٣")),
        *(("num_frames", each) for each in ("16", "21", "1", "-")),
        *(("guidance_scale", each) for each in ("0.5", "21", "nan", "1e1", "inf", "1,5")),
        *(("size", each) for each in ("96", "720x1280", "96X96", "")),
        *(("prompt", each) for each in ("", "  ", "\x00", "&nbsp;", "&#8203;")),
        ("negative_prompt", "\x07"),
    ],
)
def test_form_fields_are_read_strictly(
    client: TestClient, live_worker: WorkerOffer, redis: Redis, field: str, value: str
) -> None:
    fields = {"prompt": PROMPT} | {field: value}
    parts: dict[str, Any] = {name: (None, text) for name, text in fields.items()}
    error = refusal(client.post("/v1/videos", files=parts))
    assert (error["param"], error["code"]) == (field, "invalid_spec")
    assert redis.llen(f"rq:queue:{live_worker.queue}") == 0


def test_every_fault_is_in_the_message(create: Create) -> None:
    error = refusal(create(model="sora-2", seconds="4", size="1x1", quality="high"))
    assert error["param"] == "quality"
    for part in (
        "quality is not a field; the fields are model, seconds, prompt,",
        "model sora-2 is unknown;",
        "seconds is 4, which is not",
        "size 1x1 is not offered;",
        "prompt is missing;",
    ):
        assert part in error["message"]


@pytest.mark.parametrize("value", ["file", {"image_url": "https://example.org/x.png"}, "text"])
@pytest.mark.usefixtures("live_worker")
def test_reference_images_are_refused(client: TestClient, value: Any) -> None:
    if value == "file":
        parts: dict[str, Any] = {
            "prompt": (None, PROMPT),
            "input_reference": ("a.png", b"\x89PNG", "image/png"),
        }
        answer = client.post("/v1/videos", files=parts)
    else:
        answer = client.post("/v1/videos", json={"prompt": PROMPT, "input_reference": value})
    error = refusal(answer)
    assert error["param"] == "input_reference"
    assert "makes videos from text alone" in error["message"]


@pytest.mark.parametrize("name", ["prompt", "model", "seconds", "seed", "size", "surprise"])
@pytest.mark.usefixtures("live_worker")
def test_a_file_is_no_value_of_any_field(client: TestClient, name: str) -> None:
    parts: dict[str, Any] = {"prompt": (None, PROMPT)} | {name: ("a.txt", b"2", "text/plain")}
    assert refusal(client.post("/v1/videos", files=parts))["param"] == name


@pytest.mark.usefixtures("live_worker")
def test_a_field_given_twice_is_refused(client: TestClient) -> None:
    parts = [("prompt", (None, PROMPT)), ("seed", (None, "1")), ("seed", (None, "2"))]
    assert refusal(client.post("/v1/videos", files=parts))["param"] == "seed"


@pytest.mark.usefixtures("live_worker")
def test_names_beyond_the_twentieth_that_is_no_field_are_counted(client: TestClient) -> None:
    body = {"prompt": PROMPT, "seed": -1} | {f"{number:x}": 1 for number in range(20_000)}
    error = refusal(client.post("/v1/videos", json=body))
    assert "19980 more names are not fields" in error["message"]
    assert "seed" in error["message"]
    assert len(error["message"]) < 10_000


@pytest.mark.parametrize("body", [b"{", b"[]", b'"x"', b"null", b"7", b"\xff", b"[" * 100_000])
@pytest.mark.usefixtures("live_worker")
def test_bodies_that_are_no_object(client: TestClient, body: bytes) -> None:
    headers = {"content-type": "application/json"}
    refusal(client.post("/v1/videos", content=body, headers=headers))


@pytest.mark.parametrize(
    "headers",
    [
        {"content-type": "text/plain"},
        {"content-type": "application/x-www-form-urlencoded"},
        {"content-type": "application/json", "content-encoding": "gzip"},
        {"content-type": "multipart/form-data; boundary=x", "content-encoding": "br"},
    ],
)
@pytest.mark.usefixtures("live_worker")
def test_bodies_in_other_formats(client: TestClient, headers: dict[str, str]) -> None:
    answer = client.post("/v1/videos", content=b'{"prompt": "x"}', headers=headers)
    assert answer.status_code == 415
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "unsupported_media_type")


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("multipart/form-data", b"--x\r\n"),
        ("multipart/form-data; boundary=x", b"prompt=x"),
        (
            "multipart/form-data; boundary=x",
            b"--x\r\nContent-Disposition: form-data\r\n\r\na\r\n--x--",
        ),
        ("multipart/form-data; boundary=x", b""),
        (
            "multipart/form-data; boundary=x; charset=punycode",
            b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n\xff\xfe-\r\n--x--\r\n',
        ),
        (
            "multipart/form-data; boundary=x; charset=unicode_escape",
            b'--x\r\nContent-Disposition: form-data; name="\\ud800"\r\n\r\na\r\n' * 2
            + b"--x--\r\n",
        ),
        (
            "multipart/form-data; boundary=x",
            b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na\r\n' * 65
            + b"--x--\r\n",
        ),
    ],
)
@pytest.mark.usefixtures("live_worker")
def test_bodies_that_cannot_be_read(client: TestClient, content_type: str, body: bytes) -> None:
    refusal(client.post("/v1/videos", content=body, headers={"content-type": content_type}))


@pytest.mark.usefixtures("live_worker")
def test_numbers_in_json_are_numbers(client: TestClient) -> None:
    for field in ("seed", "num_frames", "num_inference_steps", "guidance_scale"):
        answer = client.post("/v1/videos", json={"prompt": PROMPT, field: "5"})
        assert refusal(answer)["param"] == field
    nothing = dict.fromkeys(("model", "seconds", "size", "seed", "num_frames"))
    assert client.post("/v1/videos", json={"prompt": PROMPT, **nothing}).status_code == 200


def test_nothing_served_is_a_503_that_says_when_to_come_back(
    client: TestClient, redis: Redis, offer: WorkerOffer
) -> None:
    for model in (None, "sora-2"):
        answer = client.post("/v1/videos", json={"prompt": PROMPT, "model": model})
        assert (answer.status_code, answer.json()["error"]["type"]) == (503, "server_error")
        assert answer.headers["retry-after"] == "5"
    catalog.publish(redis, offer)
    catalog.withdraw(redis, offer.worker_id)
    answer = client.post("/v1/videos", json={"prompt": PROMPT, "model": "w8a8"})
    assert answer.json()["error"]["code"] == "mode_not_served"
    refusal(client.post("/v1/videos", json={"prompt": PROMPT, "model": "sora-2"}))


def test_a_mode_of_two_models_needs_its_model(
    client: TestClient, redis: Redis, live_worker: WorkerOffer
) -> None:
    other = live_worker.model.model_copy(update={"name": "wan-other", "fps": 16})
    modes = live_worker.modes[:1]
    changes = {"worker_id": "w2", "model": other, "modes": modes}
    queue = catalog.queue_name(other, modes)
    catalog.publish(redis, live_worker.model_copy(update=changes | {"queue": queue}))
    error = refusal(client.post("/v1/videos", json={"prompt": PROMPT, "model": "bf16"}))
    assert (
        "is a mode of several models; use one of wan-mini:bf16, wan-mini:w8a8, wan-other:bf16"
        in (error["message"])
    )
    assert refusal(client.post("/v1/videos", json={"prompt": PROMPT}))["param"] == "model"
    for model, seconds in (("w8a8", "2"), ("wan-other", "1"), ("wan-other:bf16", "1")):
        answer = client.post(
            "/v1/videos", json={"prompt": PROMPT, "model": model, "seconds": seconds}
        )
        assert answer.json()["num_frames"] == 17, answer.text


@pytest.mark.usefixtures("live_worker")
def test_a_full_queue_is_a_429_that_says_when_to_come_back(settings: ServiceSettings) -> None:
    app = create_app(settings.model_copy(update={"max_waiting": 1}))
    with TestClient(app) as client:
        assert client.post("/v1/videos", json={"prompt": PROMPT}).status_code == 200
        answer = client.post("/v1/videos", json={"prompt": PROMPT})
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "10")
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")


def test_poll_after_follows_what_was_measured(
    client: TestClient, store: JobStore, redis: Redis, live_worker: WorkerOffer
) -> None:
    body = {"prompt": PROMPT, "num_inference_steps": 20}
    first = store.get(client.post("/v1/videos", json=body).json()["id"])
    measure(redis, first.request, Durations(step_s=0.7, rest_s=2))
    answer = client.get(f"/v1/videos/{first.id}")
    assert answer.json()["seconds_left"] == pytest.approx(16)
    assert answer.headers["openai-poll-after-ms"] == "1600"


def test_a_key_means_the_same_job_whichever_way_it_is_sent(
    client: TestClient, redis: Redis, live_worker: WorkerOffer
) -> None:
    key = {"Idempotency-Key": "k-1"}
    body = {"prompt": PROMPT, "seed": 7, "guidance_scale": 2.5}
    first = client.post("/v1/videos", json=body, headers=key)
    assert "idempotent-replayed" not in first.headers
    parts = {name: (None, str(value)) for name, value in body.items()}
    catalog.withdraw(redis, live_worker.worker_id)
    again = client.post("/v1/videos", files=parts, headers=key)
    assert (again.status_code, again.headers["idempotent-replayed"]) == (200, "true")
    assert again.json()["id"] == first.json()["id"]
    taken = client.post("/v1/videos", json=body | {"seed": 8}, headers=key)
    assert (taken.status_code, taken.headers["x-should-retry"]) == (409, "false")
    error = taken.json()["error"]
    assert (error["type"], error["code"]) == ("conflict_error", "idempotency_conflict")
    bad = client.post("/v1/videos", json=body, headers={"Idempotency-Key": "a b"})
    assert refusal(bad)["param"] == "Idempotency-Key"
    assert redis.llen(f"rq:queue:{live_worker.queue}") == 1


@pytest.mark.usefixtures("live_worker")
def test_webhooks_are_those_of_the_service(settings: ServiceSettings) -> None:
    allowed = settings.model_copy(update={"webhook_hosts": "hooks.example"})
    with TestClient(create_app(allowed)) as client:
        url = "https://hooks.example/done"
        parts = {"prompt": (None, PROMPT), "webhook_url": (None, url)}
        video = client.post("/v1/videos", files=parts)
        assert video.status_code == 200, video.text
        assert client.get(f"/jobs/{video.json()['id']}").json()["webhook"]["url"] == url
        body = {"prompt": PROMPT, "webhook_url": "https://elsewhere.example"}
        assert refusal(client.post("/v1/videos", json=body))["param"] == "webhook_url"
