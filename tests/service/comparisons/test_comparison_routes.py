"""The routes of comparisons: what is refused, with place and reason; states; pages; copies."""

import base64
from collections.abc import Callable
from typing import Any

import pytest
from fastapi.testclient import TestClient
from redis import Redis

from deploy.local.waiting import wait_until
from jobs import catalog, redis_keys
from jobs.catalog import WorkerOffer
from jobs.record import Failure
from jobs.store.job_store import JobStore
from service.auth.api_keys import Role
from service.comparisons.model import Arm, Half, HalfState, Pair
from service.comparisons.store import ComparisonStore
from tests.service.conftest import MakeKey

Json = dict[str, Any]
BODY: Json = {
    "title": "Is w8a8 as good?",
    "reference": {"mode": "bf16"},
    "candidate": {"mode": "w8a8"},
    "prompts": ["a red circle", {"prompt": "a square", "negative_prompt": "", "seeds": [7, 8]}],
    "rating": {"gold": 1, "identical": 0, "training": 1},
}
pytestmark = pytest.mark.usefixtures("live_worker")


@pytest.fixture
def create(client: TestClient, redis: Redis) -> Callable[..., Json]:
    """Create a comparison that no round of the service changes."""

    def create(**changes: object) -> Json:
        # The lock of a round that never ends: no job is submitted by the service under test.
        redis.set(redis_keys.COMPARISONS_LOCK, "test")
        answer = client.post("/comparisons", json=BODY | changes)
        assert answer.status_code == 201, answer.text
        assert answer.headers["location"] == f"/comparisons/{answer.json()['id']}"
        return dict(answer.json())

    return create


def refused(client: TestClient, redis: Redis, **changes: object) -> list[tuple[str, str]]:
    body = {name: each for name, each in (BODY | changes).items() if each is not ...}
    answer = client.post("/comparisons", json=body)
    assert answer.status_code == 422, answer.text
    assert not redis.exists(redis_keys.COMPARISONS)
    assert list(redis.scan_iter("wan:comparison:*")) == []
    return [(each["field"], each["detail"]) for each in answer.json()["errors"]]


def test_a_comparison_is_complete_when_it_is_created(
    client: TestClient, create: Callable[..., Json]
) -> None:
    made = create()
    assert made["state"] == "running"
    assert made["settings"] == {
        "size": "96x96",
        "num_frames": 17,
        "num_inference_steps": 20,
        "guidance_scale": 4.0,
    }
    own = {"num_inference_steps": None, "guidance_scale": None}
    assert made["reference"] == {"mode": "bf16", "model": "wan-mini"} | own
    assert (made["margin"], made["alpha"], made["power"], made["ties"]) == (0.1, 0.05, 0.8, "half")
    assert made["counts"] == {"pairs": 3, "ready": 0, "failed": 0, "waiting": 3, "running": 0}
    assert len(made["criteria"]) == 6
    assert "secret" not in made
    assert client.get(f"/comparisons/{made['id']}").json() == made

    pairs = client.get(f"/comparisons/{made['id']}/pairs").json()["pairs"]
    told = [
        (each["number"], each["kind"], each["prompt"], each["negative_prompt"]) for each in pairs
    ]
    assert told == [
        (1, "test", "a red circle", "blurry"),
        (2, "test", "a square", ""),
        (3, "test", "a square", ""),
        (4, "training", None, None),
        (5, "gold", None, None),
    ]
    assert [each["seed"] for each in pairs[1:3]] == [7, 8]
    assert 0 <= pairs[0]["seed"] < 2**32
    nothing = {"state": "waiting", "job_id": None, "attempts": 0, "failure": None}
    assert pairs[0]["reference"] == pairs[0]["candidate"] == nothing


def test_pairs_and_comparisons_come_in_pages(
    client: TestClient, create: Callable[..., Json]
) -> None:
    names = [create(prompts=["a"], seeds=5)["id"] for _ in range(3)]
    seen, cursor = [], ""
    while cursor is not None:
        page = client.get(f"/comparisons/{names[0]}/pairs?limit=3{cursor}").json()
        seen += [each["number"] for each in page["pairs"]]
        cursor = page["next_cursor"] and f"&cursor={page['next_cursor']}"
    assert seen == list(range(1, 8))
    first = client.get("/comparisons?limit=2").json()
    rest = client.get(f"/comparisons?cursor={first['next_cursor']}").json()
    listed = [each["id"] for each in first["comparisons"] + rest["comparisons"]]
    assert listed == sorted(names)[::-1]
    for query in ("limit=0", "limit=201", "cursor=x", "cursor=p1x", "cursor=p999999"):
        assert client.get(f"/comparisons/{names[0]}/pairs?{query}").status_code == 422


def test_prompts_come_from_a_file_and_keep_their_lines(
    client: TestClient, create: Callable[..., Json]
) -> None:
    text = "prompt;seeds\nécarlate;3 4\nblue;\n"
    content = base64.b64encode(text.encode("latin-1")).decode()
    for file in ({"text": text}, {"text_base64": content}):
        made = create(prompts=None, prompts_file={"name": "a.csv", **file}, seeds=[9])
        pairs = client.get(f"/comparisons/{made['id']}/pairs").json()["pairs"][:3]
        assert [(each["prompt"], each["seed"], each["line"]) for each in pairs] == [
            ("écarlate", 3, 2),
            ("écarlate", 4, 2),
            ("blue", 9, 3),
        ]


@pytest.mark.parametrize(
    ("changes", "field", "reason"),
    [
        ({"prompts": ["ok", "x" * 201]}, "prompts.1.prompt", "201 characters"),
        ({"prompts": ["ok", " "]}, "prompts.1.prompt", "is empty"),
        ({"prompts": ["a", "a"]}, "prompts.1", "repeats prompts.0"),
        ({"prompts": []}, "prompts", "There are 0 prompts"),
        ({"prompts": [f"p{n}" for n in range(501)]}, "prompts", "There are 501 prompts"),
        ({"prompts": [f"p{n}" for n in range(101)], "seeds": 10}, "seeds", "1010 pairs"),
        ({"prompts": ["a", {"prompt": "b", "text": "c"}]}, "prompts.1.text", "is not a field"),
        ({"prompts": [{"prompt": "b", "seeds": [-1]}]}, "prompts.0.seeds.0", "is -1"),
        ({"prompts": [{"prompt": "b", "seeds": [4, 4]}]}, "prompts.0.seeds", "seed 4 twice"),
        ({"seeds": 0}, "seeds", "is 0"),
        ({"seeds": []}, "seeds", "has no seed"),
        ({"settings": {"num_frames": 16}}, "settings.num_frames", "16, which is not 4k+1"),
        ({"settings": {"size": "8x8"}}, "settings.size", "8x8 is not offered"),
        ({"settings": {"seed": 3}}, "settings.seed", "is not a field"),
        ({"candidate": {"mode": "int8"}}, "candidate.mode", "int8 is not known"),
        ({"candidate": {"mode": "bf16"}}, "candidate", "another mode or model"),
        ({"criteria": ["beauty"]}, "criteria", "beauty"),
        ({"margin": 0}, "margin", "is 0"),
        ({"rating": {"gold": 21}}, "rating.gold", "is 21"),
        ({"title": ...}, "title", "is missing"),
        ({"title": " "}, "title", "visible"),
        ({"prompts": ..., "prompts_file": {"name": "a.csv"}}, "prompts_file", "text_base64"),
        (
            {"prompts": ..., "prompts_file": {"name": "a.csv", "text_base64": "%"}},
            "prompts_file.text_base64",
            "not base64",
        ),
        (
            {"prompts": ..., "prompts_file": {"name": "a.csv", "text": "text\nb"}},
            "prompts_file",
            "Line 1 has no column prompt",
        ),
        (
            {"prompts": ..., "prompts_file": {"name": "a.txt", "text": "ok\n" + "b" * 201}},
            "prompts_file",
            "Line 2: prompt has 201 characters",
        ),
    ],
)
def test_what_is_refused_creates_nothing_and_says_where_and_why(
    client: TestClient, redis: Redis, changes: Json, field: str, reason: str
) -> None:
    (first, *_) = refused(client, redis, **changes)
    assert first[0] == field
    assert reason in first[1]


def test_a_file_of_ten_thousand_rows_is_refused_by_its_line(
    client: TestClient, redis: Redis
) -> None:
    rows = "\n".join(f"a red circle that moves right, in take number {n}" for n in range(10_000))
    content = base64.b64encode(rows.encode()).decode()
    file = {"name": "a.txt", "text_base64": content}
    ((_, detail),) = refused(client, redis, prompts=..., prompts_file=file)
    assert detail == "Line 501 is one too many: there are 10000 prompts, and 500 are the most."
    assert client.post("/generate", json={"prompt": content}).status_code == 413
    huge = {"name": "a.txt", "text": "x" * 5_000_000}
    assert client.post("/comparisons", json=BODY | {"prompts_file": huge}).status_code == 413


def test_every_bad_line_of_a_file_is_named_once(client: TestClient, redis: Redis) -> None:
    lines = "\n".join(f"{n}" + "x" * 200 * (n % 2) for n in range(1, 7))
    file = {"name": "a.txt", "text": lines}
    found = refused(client, redis, prompts=..., prompts_file=file)
    assert [detail.split(":")[0] for _, detail in found] == ["Line 1", "Line 3", "Line 5"]


def test_models_of_different_frame_rates_are_refused(
    client: TestClient, redis: Redis, offer: WorkerOffer
) -> None:
    faster = offer.model.model_copy(update={"name": "fast", "fps": 16})
    catalog.publish(
        redis, offer.model_copy(update={"model": faster, "worker_id": "w", "queue": "fast.1"})
    )
    contenders = {
        "reference": {"mode": "bf16", "model": "wan-mini"},
        "candidate": {"mode": "bf16", "model": "fast"},
    }
    ((field, detail),) = refused(client, redis, **contenders)
    assert field == "candidate.model"
    assert "wan-mini draws 8 frames a second and fast 16" in detail


def test_a_mode_that_no_live_worker_serves_is_told(
    client: TestClient, redis: Redis, offer: WorkerOffer
) -> None:
    catalog.publish(redis, offer.model_copy(update={"modes": offer.modes[:1]}))
    answer = client.post("/comparisons", json=BODY)
    assert (answer.status_code, answer.json()["code"]) == (503, "mode_not_served")
    assert not redis.exists(redis_keys.COMPARISONS)


def test_states_change_as_they_may(client: TestClient, create: Callable[..., Json]) -> None:
    path = f"/comparisons/{create()['id']}"
    for verb, state in (
        ("pause", "paused"), ("pause", "paused"), ("resume", "running"), ("close", "closed"),
    ):  # fmt: skip
        answer = client.post(f"{path}/{verb}")
        assert (answer.status_code, answer.json()["state"]) == (200, state)
    for verb in ("pause", "resume", "cancel", "retry"):
        answer = client.post(f"{path}/{verb}")
        assert (answer.status_code, answer.json()["code"]) == (409, "comparison_conflict")
        assert "is closed" in answer.json()["detail"]
    other = f"/comparisons/{create()['id']}"
    assert client.post(f"{other}/cancel").json()["state"] == "cancelled"
    assert client.post(f"{other}/close").status_code == 409


def test_retry_makes_the_failed_halves_again(
    client: TestClient, redis: Redis, create: Callable[..., Json]
) -> None:
    made = create()
    comparisons = ComparisonStore(redis)
    (pair, *_) = comparisons.pairs(made["id"])
    failure = Failure(code="worker_lost", detail="It was lost.")
    failed = Half(state=HalfState.FAILED, job_id="a", attempt=1, failure=failure)
    succeeded = Half(state=HalfState.SUCCEEDED, job_id="b", attempt=1)

    def end(found: Pair) -> Pair:
        return found.with_half(Arm.REFERENCE, failed).with_half(Arm.CANDIDATE, succeeded)

    comparisons.update_pair(made["id"], pair.id, end)
    assert client.get(f"/comparisons/{made['id']}").json()["counts"]["failed"] == 1
    shown = client.get(f"/comparisons/{made['id']}/pairs").json()["pairs"][0]
    assert shown["state"] == "failed"
    assert shown["reference"]["failure"] == failure.model_dump()
    answer = client.post(f"/comparisons/{made['id']}/retry")
    assert answer.json()["counts"]["waiting"] == 3
    halves = comparisons.pair(made["id"], pair.id).halves
    assert halves == (Half(attempt=1), succeeded)


def test_a_clone_is_paused_and_has_the_same_pairs_but_no_videos(
    client: TestClient, create: Callable[..., Json]
) -> None:
    made = create()
    client.post(f"/comparisons/{made['id']}/close")
    answer = client.post(f"/comparisons/{made['id']}/clone")
    clone = answer.json()
    assert answer.status_code == 201
    assert answer.headers["location"] == f"/comparisons/{clone['id']}"
    fresh = ("id", "title", "created_at", "state")
    assert {name: each for name, each in clone.items() if name not in fresh} == {
        name: each for name, each in made.items() if name not in fresh
    }
    assert (clone["title"], clone["state"]) == ("Is w8a8 as good? (copy)", "paused")
    old, new = (
        client.get(f"/comparisons/{name}/pairs").json()["pairs"]
        for name in (made["id"], clone["id"])
    )
    assert {each["id"] for each in old}.isdisjoint(each["id"] for each in new)
    assert [(each["prompt"], each["seed"]) for each in old] == [
        (each["prompt"], each["seed"]) for each in new
    ]


def test_jobs_belong_to_who_created_the_comparison(
    client: TestClient, store: JobStore, make_key: MakeKey
) -> None:
    key = make_key("alice", Role.OPS)
    made = client.post("/comparisons", json=BODY, headers=key).json()
    assert made["owner"] == "alice"
    wait_until(lambda: bool(store.list().jobs), 30)  # a round of the service's own
    assert {job.owner for job in store.list().jobs} == {"alice"}
    assert client.delete(f"/comparisons/{made['id']}", headers=key).status_code == 204
    assert client.get(f"/comparisons/{made['id']}", headers=key).status_code == 404
    assert client.delete(f"/comparisons/{made['id']}", headers=key).status_code == 404
