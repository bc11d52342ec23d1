"""Test a rater's session over HTTP: from the link to the last pair, and every refusal."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
from fastapi.testclient import TestClient
from redis import Redis

from jobs.record import Failure
from service.auth.api_keys import KeyStore, Role
from service.comparisons.model import Arm, Comparison, ComparisonState, PairKind, RatingPlan
from service.comparisons.rating.votes import VoteStore
from service.comparisons.statistics.criteria import BY_ID
from service.comparisons.store import ComparisonStore
from tests.service.comparisons.rating.conftest import (
    COPY_BYTES,
    MakeComparison,
    Seat,
    join,
)
from tests.service.conftest import MakeKey

PROVENANCE = {
    "seconds_watched": 12.5,
    "frames_seen": [17, 16],
    "replays": 2,
    "viewport": [1280, 720],
    "dropped_frames": 1,
    "speed": 0.5,
    "further": {"zoomed": True, "pixel_ratio": 2},
}
ENDED = (ComparisonState.CLOSED, ComparisonState.CANCELLED)


def test_the_life_of_a_raters_session(make_comparison: MakeComparison, seat: Seat) -> None:
    comparison = make_comparison(rating=RatingPlan(repeat_share=0.5, break_every=3))
    ada = seat(comparison)
    view = ada.get("/rating").json()
    assert view["state"] == "open"
    assert [each["id"] for each in view["comparison"]["criteria"]] == list(BY_ID)
    assert all(each["definition"] for each in view["comparison"]["criteria"])
    assert view["progress"] == {
        **{"done": 0, "items": 4 + 2 + 2 + 2, "training_left": 2, "skipped": 0},
        **{"since_break": 0, "break_due": False, "waiting": False, "undo": False},
    }
    first = ada.next()
    assert (first["kind"], first["number"]) == ("training", 1)
    assert ada.next() == first, "what is shown stays until it is answered"
    kinds, breaks = [], []
    while (answer := ada.get("/rating/next")).status_code == 200:
        item = answer.json()
        kinds.append((item["kind"], item["number"]))
        done = ada.vote(item["item"], "left", provenance=PROVENANCE)
        assert done.status_code == 201, done.text
        breaks.append(done.json()["break_due"])
    assert answer.status_code == 204
    assert "retry-after" not in answer.headers
    assert kinds == [("training", n) for n in (1, 2)] + [("rated", n) for n in range(1, 11)]
    assert breaks == [False, False, *[number % 3 == 0 for number in range(1, 11)]]
    progress = ada.get("/rating").json()["progress"]
    assert (progress["done"], progress["items"], progress["training_left"]) == (10, 10, 0)


def test_what_a_vote_leaves(
    make_comparison: MakeComparison, seat: Seat, redis: Redis, client: TestClient
) -> None:
    comparison = make_comparison(1, rating=RatingPlan(training=0, gold=0, identical=0))
    ada = seat(comparison)
    item = ada.next()["item"]
    answers = dict(zip(BY_ID, ("left", "right", "tie", "left", "right", "tie"), strict=True))
    done = ada.post(f"/rating/items/{item}/vote", {"answers": answers, "provenance": PROVENANCE})
    assert done.status_code == 201
    (answer,) = VoteStore(redis).answers(comparison.id, ada.id)
    assert (answer.item, answer.choices, answer.number) == (item, answers, 1)
    found = answer.provenance.model_dump(mode="json")
    assert found == PROVENANCE


def test_the_same_link_goes_on_on_another_device(
    make_comparison: MakeComparison, seat: Seat, client: TestClient
) -> None:
    ada = seat(make_comparison())
    ada.vote(ada.next()["item"])
    shown = ada.next()  # and then the page is closed in the middle of this pair
    phone = join(client, ada.token)
    assert phone["Cookie"] != ada.headers["Cookie"]
    there = client.get("/rating/next", headers=phone).json()
    assert there == shown
    ada.headers = phone
    assert ada.vote(shown["item"]).status_code == 201
    assert ada.next()["item"] != shown["item"]


def test_undo_takes_back_the_last_answer_once_until_the_next_one(
    make_comparison: MakeComparison, seat: Seat
) -> None:
    ada = seat(make_comparison(rating=RatingPlan(training=0)))
    nothing = ada.post("/rating/undo")
    assert (nothing.status_code, nothing.json()["code"]) == (409, "nothing_to_undo")
    first = ada.next()
    assert first["undo"] is False
    ada.vote(first["item"])
    second = ada.next()
    assert second["undo"] is True
    undone = ada.post("/rating/undo")
    assert (undone.status_code, undone.json()["done"], undone.json()["undo"]) == (200, 0, False)
    assert ada.next()["item"] == first["item"], "the pair comes again"
    assert ada.post("/rating/undo").status_code == 409, "only the last answer, and once"
    assert ada.vote(first["item"], "right").status_code == 201
    assert ada.next()["item"] == second["item"], "and then the one that was shown already"
    skipped = ada.post(f"/rating/items/{second['item']}/skip", {"reason": "it stutters"})
    assert (skipped.status_code, skipped.json()["skipped"], skipped.json()["done"]) == (201, 1, 2)
    back = ada.post("/rating/undo").json()
    assert (back["skipped"], back["done"]) == (0, 1)
    assert ada.post("/rating/undo").status_code == 409, "the vote before is for good"


def test_undo_during_training(make_comparison: MakeComparison, seat: Seat) -> None:
    ada = seat(make_comparison())
    first = ada.next()["item"]
    assert ada.vote(first).json()["training_left"] == 1
    assert ada.post("/rating/undo").json()["training_left"] == 2
    assert ada.next()["item"] == first


def test_two_votes_at_once_are_one(make_comparison: MakeComparison, seat: Seat) -> None:
    ada = seat(make_comparison(rating=RatingPlan(training=0)))
    start = threading.Barrier(6)
    statuses: list[int] = []

    def send(item: str, choice: str) -> None:
        start.wait()
        statuses.append(ada.vote(item, choice).status_code)

    for _ in range(5):
        statuses.clear()
        item = ada.next()["item"]
        choices = ("left", "right") * 3
        threads = [threading.Thread(target=send, args=(item, choice)) for choice in choices]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(statuses) == [201, 409, 409, 409, 409, 409]
    assert ada.get("/rating").json()["progress"]["done"] == 5


def test_two_devices_that_ask_at_once_are_shown_the_same(
    make_comparison: MakeComparison, seat: Seat
) -> None:
    ada = seat(make_comparison())
    found: list[str] = []
    start = threading.Barrier(6)

    def ask() -> None:
        start.wait()
        found.append(ada.next()["item"])

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1


def test_voting_twice_is_refused(make_comparison: MakeComparison, seat: Seat) -> None:
    ada = seat(make_comparison())
    item = ada.next()["item"]
    assert ada.vote(item, "left").status_code == 201
    for answer in (ada.vote(item, "right"), ada.post(f"/rating/items/{item}/skip", {})):
        assert (answer.status_code, answer.json()["code"]) == (409, "already_voted")
    assert "undo" in answer.json()["detail"]


def test_voting_for_others_is_refused(make_comparison: MakeComparison, seat: Seat) -> None:
    comparison = make_comparison()
    ada, bob = seat(comparison), seat(comparison, "Bob")
    item = ada.next()["item"]
    assert ada.next()["item"] != bob.next()["item"]
    for answer in (
        bob.vote(item),
        bob.post(f"/rating/items/{item}/skip", {}),
        bob.get(f"/rating/items/{item}/left.mp4"),
    ):
        assert (answer.status_code, answer.json()["code"]) == (403, "forbidden")
    assert ada.vote(item).status_code == 201
    # A rater of another comparison learns nothing about it.
    eve = seat(make_comparison(), "Eve")
    for answer in (eve.vote(item), eve.get(f"/rating/items/{item}/left.mp4")):
        assert (answer.status_code, answer.json()["code"]) == (404, "item_not_found")


def test_a_pair_that_failed_is_refused_passed_over_and_left_out(
    make_comparison: MakeComparison, seat: Seat, comparisons: ComparisonStore, redis: Redis
) -> None:
    comparison = make_comparison(rating=RatingPlan(training=0, gold=0, identical=0))
    ada = seat(comparison)
    item = ada.next()["item"]
    found = VoteStore(redis).find(comparison.id, item)
    assert found is not None
    broken = found[1].item.pair_id
    failure = Failure(code="video_gone", detail="It is gone.")
    comparisons.update_pair(
        comparison.id, broken, lambda pair: pair.model_copy(update={"failure": failure})
    )
    refused = ada.vote(item)
    assert (refused.status_code, refused.json()["code"]) == (409, "pair_left_out")
    # The page goes on; the desk knows of the failure within two seconds.
    ada.client.app.state.app_state.desk._cached.clear()  # type: ignore[attr-defined]
    assert len(ada.all_items()) == 3
    assert ada.get("/rating").json()["progress"]["items"] == 3


@pytest.mark.parametrize("state", ENDED)
def test_nothing_is_taken_after_the_end(
    make_comparison: MakeComparison,
    seat: Seat,
    comparisons: ComparisonStore,
    client: TestClient,
    ops: dict[str, str],
    state: ComparisonState,
) -> None:
    comparison = make_comparison()
    ada = seat(comparison)
    ada.vote(ada.next()["item"])
    item = ada.next()["item"]
    comparisons.change_state(comparison.id, state, tuple(ComparisonState))
    for answer in (
        ada.vote(item),
        ada.post(f"/rating/items/{item}/skip", {}),
        ada.post("/rating/undo"),
        ada.get("/rating/next"),
    ):
        assert answer.status_code == 409, answer.text
        assert (answer.json()["code"], answer.json()["state"]) == ("comparison_conflict", "closed")
    assert ada.get("/rating").json()["state"] == "closed"
    late = client.post(f"/comparisons/{comparison.id}/raters", json={"name": "Bob"}, headers=ops)
    assert late.status_code == 409


def test_a_paused_comparison_waits_and_loses_nothing(
    make_comparison: MakeComparison, seat: Seat, comparisons: ComparisonStore
) -> None:
    comparison = make_comparison()
    ada = seat(comparison)
    shown = ada.next()
    comparisons.change_state(comparison.id, ComparisonState.PAUSED, tuple(ComparisonState))
    for answer in (ada.vote(shown["item"]), ada.get("/rating/next")):
        assert (answer.status_code, answer.json()["state"]) == (409, "paused")
    assert ada.get("/rating").json()["state"] == "paused"
    comparisons.change_state(comparison.id, ComparisonState.RUNNING, tuple(ComparisonState))
    assert ada.next() == shown
    assert ada.vote(shown["item"]).status_code == 201


@pytest.mark.parametrize(
    ("body", "fields"),
    [
        ([], ["body"]),
        ({}, ["answers"]),
        ({"answers": {}}, [f"answers.{name}" for name in BY_ID]),
        ({"answers": {"overall": "left"}}, [f"answers.{n}" for n in BY_ID if n != "overall"]),
        ({"answers": dict.fromkeys(BY_ID, "both")}, [f"answers.{name}" for name in BY_ID]),
        ({"answers": {name: ["left"] for name in BY_ID}}, [f"answers.{name}" for name in BY_ID]),
        ({"answers": dict.fromkeys([*BY_ID, "beauty"], "tie")}, ["answers.beauty"]),
        ({"answers": dict.fromkeys(BY_ID, "tie"), "mode": "w8a8"}, ["mode"]),
        ({"provenance": {"seconds_watched": -1}}, ["answers", "provenance.seconds_watched"]),
    ],
)
def test_a_vote_without_all_its_answers_is_refused(
    make_comparison: MakeComparison, seat: Seat, body: Any, fields: list[str]
) -> None:
    ada = seat(make_comparison())
    item = ada.next()["item"]
    answer = ada.post(f"/rating/items/{item}/vote", body)
    assert answer.status_code == 422, answer.text
    assert sorted(each["field"] for each in answer.json()["errors"]) == sorted(fields)
    assert ada.next()["item"] == item


@pytest.mark.parametrize(
    ("provenance", "field"),
    [
        ({"seconds_watched": 1e9}, "seconds_watched"),
        ({"seconds_watched": "NaN"}, "seconds_watched"),
        ({"frames_seen": [1]}, "frames_seen"),
        ({"frames_seen": [1, -1]}, "frames_seen"),
        ({"replays": 10**9}, "replays"),
        ({"viewport": [1, 1, 1]}, "viewport"),
        ({"speed": 0}, "speed"),
        ({"agent": "x"}, "agent"),
        ({"further": {"Name": 1}}, "further"),
        ({"further": {"text": "x" * 201}}, "further"),
        ({"further": {"nested": {}}}, "further"),
        ({"further": {f"n{number}": 0 for number in range(17)}}, "further"),
    ],
)
def test_provenance_is_bounded(
    make_comparison: MakeComparison, seat: Seat, provenance: dict[str, object], field: str
) -> None:
    ada = seat(make_comparison())
    answer = ada.vote(ada.next()["item"], provenance=provenance)
    assert answer.status_code == 422, answer.text
    assert all(
        each["field"].startswith(f"provenance.{field}") for each in answer.json()["errors"]
    ), answer.text


def test_a_reason_to_skip_is_bounded(make_comparison: MakeComparison, seat: Seat) -> None:
    ada = seat(make_comparison())
    path = f"/rating/items/{ada.next()['item']}/skip"
    assert ada.post(path, {"reason": "x" * 501}).status_code == 422
    assert ada.post(path, {"reason": None}).status_code == 201


def test_removing_a_rater_ends_the_sessions_and_keeps_the_votes(
    make_comparison: MakeComparison,
    seat: Seat,
    client: TestClient,
    ops: dict[str, str],
) -> None:
    comparison = make_comparison()
    ada, bob = seat(comparison), seat(comparison, "Bob")
    for each in (ada, bob):
        each.all_items()
    path = f"/comparisons/{comparison.id}/raters/{ada.id}"
    for _ in range(2):
        assert client.delete(path, headers=ops).status_code == 204
    for answer in (ada.get("/rating"), ada.get("/session")):
        assert (answer.status_code, answer.json()["code"]) == (401, "unauthenticated")
    assert client.post("/rating/join", json={"token": ada.token}).status_code == 401
    assert bob.get("/rating").status_code == 200
    report = client.get(f"/comparisons/{comparison.id}/report", headers=ops).json()
    assert [(each["name"], each["removed"], each["votes"]) for each in report["raters"]] == [
        ("Ada", True, 8),
        ("Bob", False, 8),
    ]


def test_a_link_can_be_replaced(
    make_comparison: MakeComparison, seat: Seat, client: TestClient, ops: dict[str, str]
) -> None:
    comparison = make_comparison()
    ada = seat(comparison)
    shown = ada.next()
    made = client.post(f"/comparisons/{comparison.id}/raters/{ada.id}/link", headers=ops)
    assert (made.status_code, made.json()["id"]) == (201, ada.id)
    assert ada.get("/rating").status_code == 401
    assert client.post("/rating/join", json={"token": ada.token}).status_code == 401
    ada.headers = join(client, made.json()["url"].partition("#")[2])
    assert ada.next() == shown


def test_deleting_the_comparison_ends_the_session(
    make_comparison: MakeComparison, seat: Seat, comparisons: ComparisonStore, redis: Redis
) -> None:
    comparison = make_comparison()
    ada = seat(comparison)
    ada.vote(ada.next()["item"])
    comparisons.delete(comparison.id)
    for answer in (ada.get("/rating"), ada.get("/rating/next"), ada.post("/rating/undo")):
        assert answer.status_code == 401
    assert list(redis.scan_iter(f"wan:comparison:{comparison.id}*")) == []


def test_what_is_no_link_is_refused(
    make_comparison: MakeComparison, seat: Seat, client: TestClient
) -> None:
    ada = seat(make_comparison())
    comparison_id, rater_id, secret = ada.token.split(".")
    other = secret[:-1] + ("0" if secret[-1] != "0" else "1")
    guesses = (f"{comparison_id}.{rater_id}.{other}", f"{'0' * 32}.{rater_id}.{secret}")
    for token in ("", "x", *guesses):
        answer = client.post("/rating/join", json={"token": token})
        assert (answer.status_code, answer.json()["code"]) == (401, "unauthenticated")
        assert "set-cookie" not in answer.headers
    for body in ({}, {"token": ada.token, "comparison": comparison_id}, {"token": 1}, {"x": 1}):
        answer = client.post("/rating/join", json=body)
        assert answer.status_code == 422, answer.text
        assert ada.token not in answer.text
    for _ in range(30):
        client.post("/rating/join", json={"token": "guess"})
    assert client.post("/rating/join", json={"token": "guess"}).status_code == 429
    join(client, ada.token)  # others at this address come in all the same


def test_a_rater_may_do_nothing_else(
    make_comparison: MakeComparison, seat: Seat, client: TestClient, make_key: MakeKey
) -> None:
    comparison = make_comparison()
    ada = seat(comparison)
    assert ada.get("/session").json() == {"name": "Ada", "role": "rater", "open": False}
    by_key = make_key("grace", Role.RATER)
    for path in (
        "/jobs",
        "/models",
        "/workers",
        "/metrics",
        f"/comparisons/{comparison.id}/report",
    ):
        assert ada.get(path).status_code == 403, path
        assert client.get(path, headers=by_key).status_code == 403, path
    asked = client.post("/generate", json={"prompt": "x"}, headers=by_key)
    assert (asked.status_code, "role" in asked.json()["detail"]) == (403, True)
    assert client.get("/v1/videos", headers=by_key).status_code == 403
    out = client.delete("/session", headers=ada.headers)
    assert out.status_code == 204
    assert ada.get("/rating").status_code == 401


def test_a_rater_stays_one_on_an_open_service(
    make_comparison: MakeComparison, client: TestClient
) -> None:
    """On an open service everybody is ops, but a page that joined is a rater's."""
    comparison = make_comparison()
    added = client.post(f"/comparisons/{comparison.id}/raters", json={"name": "Ada"})
    headers = join(client, added.json()["url"].partition("#")[2])
    assert client.get("/rating", headers=headers).status_code == 200
    assert client.get("/session", headers=headers).json()["role"] == "rater"
    assert client.get("/jobs", headers=headers).status_code == 403
    assert client.get("/jobs").status_code == 200
    assert client.get("/rating").status_code == 403


def test_a_key_of_role_rater_opens_its_seats(
    make_comparison: MakeComparison,
    seat: Seat,
    client: TestClient,
    ops: dict[str, str],
    make_key: MakeKey,
    comparisons: ComparisonStore,
) -> None:
    grace = make_key("grace", Role.RATER)
    first = make_comparison(title="first")
    nobody = client.get("/rating", headers=grace)
    assert (nobody.status_code, "no seat" in nobody.json()["detail"]) == (403, True)
    unknown = {"name": "Grace", "key": "gracie"}
    path = f"/comparisons/{first.id}/raters"
    refused = client.post(path, json=unknown, headers=ops)
    assert (refused.status_code, refused.json()["errors"][0]["field"]) == (422, "key")
    added = client.post(path, json={"name": "Grace", "key": "grace"}, headers=ops)
    assert added.status_code == 201
    twice = client.post(path, json={"name": "Grace 2", "key": "grace"}, headers=ops)
    assert (twice.status_code, "votes once" in twice.json()["detail"]) == (409, True)

    def title() -> str:
        return str(client.get("/rating", headers=grace).json()["comparison"]["title"])

    assert title() == "first"
    # By a link of another comparison, which the key then opens first.
    second = make_comparison(title="second")
    ada = seat(second)
    by_link = client.post("/rating/join", json={"token": ada.token}, headers=grace)
    assert by_link.status_code == 200
    client.cookies.clear()
    assert title() == "second"
    chosen = client.post("/rating/join", json={"comparison": first.id}, headers=grace)
    assert chosen.status_code == 200
    assert "set-cookie" not in chosen.headers
    assert title() == "first"
    comparisons.change_state(first.id, ComparisonState.CLOSED, tuple(ComparisonState))
    assert title() == "second", "what has ended comes last"
    elsewhere = make_comparison()
    refused = client.post("/rating/join", json={"comparison": elsewhere.id}, headers=grace)
    assert refused.status_code == 403
    linus = make_key("linus", Role.RATER)
    taken = client.post("/rating/join", json={"token": ada.token}, headers=linus)
    assert (taken.status_code, taken.json()["code"]) == (409, "comparison_conflict")


@pytest.mark.parametrize("name", ["", "  ", "x" * 81, "a\nb", 7, None])
def test_a_raters_name_is_text(
    make_comparison: MakeComparison, client: TestClient, ops: dict[str, str], name: object
) -> None:
    path = f"/comparisons/{make_comparison().id}/raters"
    answer = client.post(path, json={"name": name}, headers=ops)
    assert answer.status_code == 422, answer.text
    assert [each["field"] for each in answer.json()["errors"]] == ["name"]


def test_what_belongs_to_no_comparison_is_not_found(
    client: TestClient, ops: dict[str, str]
) -> None:
    missing = f"/comparisons/{'0' * 32}"
    for method, path, body in (
        ("GET", "/raters", None),
        ("POST", "/raters", {"name": "Ada"}),
        ("DELETE", "/raters/000000000000", None),
        ("GET", "/report", None),
        ("GET", "/export.csv", None),
        ("GET", "/export.jsonl", None),
    ):
        answer = client.request(method, missing + path, json=body, headers=ops)
        assert (answer.status_code, answer.json()["code"]) == (404, "comparison_not_found"), path


def test_the_list_of_raters(
    make_comparison: MakeComparison, seat: Seat, client: TestClient, ops: dict[str, str]
) -> None:
    comparison = make_comparison()
    ada, bob = seat(comparison), seat(comparison, "Bob")
    ada.all_items()
    bob.vote(bob.next()["item"])
    found = client.get(f"/comparisons/{comparison.id}/raters", headers=ops)
    rows = [
        (each["name"], each["votes"], each["items"], each["done"])
        for each in found.json()["raters"]
    ]
    assert rows == [("Ada", 8, 8, True), ("Bob", 0, 8, False)]
    assert ada.token.split(".")[2] not in found.text
    view = client.get(f"/comparisons/{comparison.id}", headers=ops).json()
    assert view["raters"] == found.json()["raters"]


def test_both_videos_are_sent_alike(
    make_comparison: MakeComparison, seat: Seat, put_files: Callable[[Comparison], None]
) -> None:
    comparison = make_comparison()
    put_files(comparison)
    ada = seat(comparison)
    item = ada.next()
    answers = {side: ada.get(item[side]["url"]) for side in ("left", "right")}
    headers = []
    for answer in answers.values():
        assert answer.status_code == 200
        assert len(answer.content) == COPY_BYTES
        names = [name for name, _ in answer.headers.multi_items()]
        assert "last-modified" not in names
        assert "content-disposition" not in names
        own = dict(answer.headers)
        assert own.pop("etag") != ""
        assert own.pop("x-request-id") != ""
        headers.append((names, own))
    assert headers[0] == headers[1]
    assert headers[0][1]["cache-control"] == "private, no-store"
    assert {answer.content[:1] for answer in answers.values()} == {b"r", b"c"}
    part = ada.get(item["left"]["url"], Range="bytes=10-19")
    assert (part.status_code, len(part.content)) == (206, 10)
    assert part.headers["content-range"] == f"bytes 10-19/{COPY_BYTES}"
    assert part.headers["etag"] == answers["left"].headers["etag"]
    same = ada.get(item["left"]["url"], **{"If-None-Match": part.headers["etag"]})
    assert same.status_code == 304
    head = ada.client.head(item["right"]["url"], headers=ada.headers)
    assert (head.status_code, head.headers["content-length"]) == (200, str(COPY_BYTES))
    assert ada.get(f"/rating/items/{item['item']}/middle.mp4").status_code == 422


def test_a_video_that_is_gone(make_comparison: MakeComparison, seat: Seat) -> None:
    ada = seat(make_comparison())
    answer = ada.get(ada.next()["left"]["url"])
    assert (answer.status_code, answer.json()["code"]) == (409, "pair_left_out")


def test_waiting_for_videos_is_told_apart_from_the_end(
    comparisons: ComparisonStore, make_comparison: MakeComparison, seat: Seat
) -> None:
    comparison = make_comparison()
    pairs = {pair.id: pair for pair in comparisons.pairs(comparison.id)}

    def unmade(pair: Any) -> Any:
        return pair.with_half(Arm.CANDIDATE, pair.candidate.model_copy(update={"copy_": None}))

    for pair in pairs.values():
        if pair.kind is PairKind.TEST:
            comparisons.update_pair(comparison.id, pair.id, unmade)
    ada = seat(comparison)
    for _ in range(2):
        item = ada.next()
        assert item["kind"] == "training"
        assert ada.vote(item["item"]).status_code == 201
    waiting = ada.get("/rating/next")
    assert (waiting.status_code, waiting.headers["retry-after"]) == (204, "5")
    for pair in pairs.values():
        comparisons.update_pair(comparison.id, pair.id, lambda each: pairs[each.id])
    ada.client.app.state.app_state.desk._cached.clear()  # type: ignore[attr-defined]
    assert len(ada.all_items()) == 8


def test_a_foreign_page_cannot_join(
    make_comparison: MakeComparison, seat: Seat, client: TestClient, key_store: KeyStore
) -> None:
    ada = seat(make_comparison())
    foreign = {"Origin": "https://elsewhere.example"}
    answer = client.post("/rating/join", json={"token": ada.token}, headers=foreign)
    assert (answer.status_code, "set-cookie" in answer.headers) == (403, False)
    assert client.post("/rating/undo", headers={"Cookie": ada.headers["Cookie"]}).status_code == 403
