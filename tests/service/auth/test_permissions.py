"""Test every endpoint with every kind of caller, against the table in `permission_table.py`."""

from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx2
import pytest
from fastapi.routing import iter_route_contexts
from fastapi.testclient import TestClient
from redis import Redis

from jobs.artifacts.store import open_artifacts
from jobs.catalog import WorkerOffer
from jobs.store.job_store import JobStore
from service.app import create_app
from service.auth.api_keys import KeyStore, Role
from service.comparisons.model import RatingPlan
from service.comparisons.rating.desk import RatingDesk
from service.comparisons.rating.raters import RaterStore
from service.comparisons.rating.votes import Provenance, VoteStore
from service.comparisons.store import ComparisonStore
from service.pages.page_routes import SHARED_PAGES
from service.schemas.video_url import LinkSigner, VideoFile, video_path
from service.settings import ServiceSettings
from tests.service.auth.permission_table import CALLERS, DOCUMENT, ROWS, Policy, Row, table
from tests.service.comparisons.rating.conftest import COPY_BYTES, all_pairs
from tests.service.comparisons.samples import sample_comparison
from tests.service.conftest import MakeJob, MakeKey, SignIn

MakeSeat = Callable[[str], dict[str, str]]
NOT_SEATED: dict[str, str] = {}


def endpoints(settings: ServiceSettings) -> Iterator[str]:
    """List every method and path of the application's routes, without pages that programs miss."""
    for route in iter_route_contexts(create_app(settings).routes):
        if route.name in SHARED_PAGES.values():
            continue  # without data, and not answered to programs
        methods = route.methods or {"ANY"}
        # A HEAD that comes with a GET is not a separate endpoint.
        for method in methods - ({"HEAD"} if "GET" in methods else set()):
            yield f"{method} {route.path}"


def test_every_endpoint_has_a_row(settings: ServiceSettings) -> None:
    found = list(endpoints(settings))
    assert sorted(found) == sorted(ROWS), (
        "an endpoint was added or removed: give it a row in permission_table.py and run "
        "`.venv/bin/python -m tests.service.auth.permission_table`"
    )


def test_the_document_is_the_table() -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == table(), (
        "docs/permissions.md is stale: "
        "run `.venv/bin/python -m tests.service.auth.permission_table`"
    )


@pytest.fixture
def keys_of(make_key: MakeKey, key_store: KeyStore) -> dict[str, dict[str, str]]:
    """The headers that each caller sends."""
    keys = {
        "rater": make_key("rater", Role.RATER),
        "owner": make_key("owner"),
        "other user": make_key("other"),
        "ops": make_key("ops", Role.OPS),
        "revoked key": make_key("revoked"),
    }
    key_store.revoke("revoked")
    return {caller: keys.get(caller, {}) for caller in CALLERS}


@pytest.fixture
def make_seat(redis: Redis, settings: ServiceSettings, tmp_path: Path) -> MakeSeat:
    """Make a comparison with a seat for the key `rater`, which is shown two pairs and voted once.

    Returns what stands for it in paths and bodies, for an endpoint that needs one.
    """
    made = tmp_path / "copy.mp4"
    made.write_bytes(b"c" * COPY_BYTES)

    def make(endpoint: str) -> dict[str, str]:
        if "/comparisons/" not in endpoint and "/rating" not in endpoint:
            return {}
        rating = RatingPlan(training=0, gold=0, identical=0, repeat_share=0)
        comparison = sample_comparison(rating=rating, criteria=("overall",))
        pairs = all_pairs(comparison)
        ComparisonStore(redis).create(comparison, pairs)
        for half in (half for pair in pairs for half in pair.halves):
            assert half.copy_ is not None
            open_artifacts(settings.artifacts_url).put(half.copy_.key, made)
        raters, desk = RaterStore(redis), RatingDesk(redis)
        rater, token = raters.add(comparison.id, "Ada", "rater")
        seat = raters.seat(comparison.id, rater.id)
        assert seat is not None
        first = desk.next(seat)
        assert first is not None
        desk.vote(seat, first.item, {"overall": "tie"}, Provenance())
        second = desk.next(seat)
        assert second is not None
        names = {"comparison_id": comparison.id, "rater_id": rater.id, "item": second.item}
        return names | {"side": "left", "TOKEN": token}

    return make


def send(
    client: TestClient,
    endpoint: str,
    job_id: str,
    query: str,
    seated: dict[str, str] = NOT_SEATED,
    **extra: object,
) -> httpx2.Response:
    if extra.get("json") == {"token": "TOKEN"}:
        extra["json"] = {"token": seated["TOKEN"]}
    method, path = endpoint.split(" ")
    values = {"job_id": job_id, "video_id": job_id, "version": "any", "name:path": "docs/docs.js"}
    values |= {"character_id": "a", "model": "wan-mini:bf16"}
    values |= {"name": "owner", "worker_id": "worker-1", **seated}
    for name, value in values.items():
        path = path.replace(f"{{{name}}}", value)
    client.cookies.clear()  # the callers are different clients
    assert "{" not in path, f"no value for a parameter of {endpoint}"
    return client.request(method, path + query, **extra)  # type: ignore[arg-type]


def signed(signer: LinkSigner, endpoint: str, job_id: str) -> str:
    """The query of a link to the endpoint's file; of one to the video where no link opens it."""
    files = (each for each in VideoFile if video_path("{job_id}", each) in endpoint)
    return "?" + urlsplit(signer.sign(video_path(job_id, next(files, VideoFile.VIDEO)))).query


@pytest.mark.usefixtures("live_worker")
@pytest.mark.parametrize(("endpoint", "row"), ROWS.items(), ids=ROWS.keys())
def test_the_row_is_true(
    *,
    client: TestClient,
    redis: Redis,
    keys_of: dict[str, dict[str, str]],
    make_job: MakeJob,
    make_seat: MakeSeat,
    endpoint: str,
    row: Row,
) -> None:
    signer = LinkSigner(redis, None, 3600)
    theirs = make_job("other", video=True)
    for caller in CALLERS:
        # A job for each caller: the request of one must not change the answer to the next.
        job = make_job("owner", video=row.finished, preview=row.preview)
        needs_no_key = row.policy in (Policy.PUBLIC, Policy.LINK)
        with_link = caller == "signed link" and not needs_no_key
        query = signed(signer, endpoint, job.id) if with_link else ""
        seated = make_seat(endpoint)
        headers = keys_of[caller]
        answer = send(client, endpoint, job.id, query, seated, headers=headers, json=row.json)
        assert answer.status_code == (row.policy.refusal(caller) or row.done), (caller, answer.text)
        if answer.status_code >= 400:
            assert job.request.prompt not in answer.text, caller
        elif row.lists:
            assert (job.id in answer.text) is (caller in ("owner", "ops")), caller
            assert (theirs.id in answer.text) is (caller in ("other user", "ops")), caller


@pytest.mark.usefixtures("live_worker")
@pytest.mark.parametrize(("endpoint", "row"), ROWS.items(), ids=ROWS.keys())
def test_a_session_may_do_what_its_key_may(
    *,
    client: TestClient,
    make_key: MakeKey,
    make_job: MakeJob,
    make_seat: MakeSeat,
    sign_in: SignIn,
    endpoint: str,
    row: Row,
) -> None:
    pages = {
        "owner": sign_in(make_key("owner")),
        "other user": sign_in(make_key("other")),
        "ops": sign_in(make_key("ops", Role.OPS)),
        "rater": sign_in(make_key("rater", Role.RATER)),
    }
    for caller, page in pages.items():
        refusal = row.policy.refusal(caller)
        if " /v1" in endpoint or endpoint == "POST /session":
            refusal = 401  # here only a key will do
        job = make_job("owner", video=row.finished, preview=row.preview)
        seated = make_seat(endpoint)
        answer = send(client, endpoint, job.id, "", seated, headers=page, json=row.json)
        assert answer.status_code == (refusal or row.done), (caller, answer.text)


@pytest.mark.usefixtures("live_worker")
@pytest.mark.parametrize("caller", ["nobody", "other user", "revoked key", "signed link", "rater"])
def test_who_is_refused_has_changed_nothing(
    *,
    client: TestClient,
    redis: Redis,
    store: JobStore,
    keys_of: dict[str, dict[str, str]],
    make_job: MakeJob,
    make_seat: MakeSeat,
    caller: str,
) -> None:
    seated = make_seat("GET /rating")
    names = seated["comparison_id"], seated["rater_id"]
    raters, votes = RaterStore(redis), VoteStore(redis)
    rated = raters.all(names[0]), votes.history(*names)
    jobs = [make_job("owner"), make_job("owner", video=True)]
    before = [store.get(job.id) for job in jobs]
    signer = LinkSigner(redis, None, 3600)
    for endpoint, row in ROWS.items():
        if row.policy.refusal(caller) is None:
            continue
        for job in jobs:
            query = signed(signer, endpoint, job.id) if caller == "signed link" else ""
            send(client, endpoint, job.id, query, seated, headers=keys_of[caller], json=row.json)
    assert (raters.all(names[0]), votes.history(*names)) == rated
    assert [store.get(job.id) for job in jobs] == before
    assert {job.id for job in store.list().jobs} == {job.id for job in jobs}


@pytest.mark.parametrize(("endpoint", "row"), ROWS.items(), ids=ROWS.keys())
def test_an_open_service_lets_everybody_do_what_ops_may(
    client: TestClient,
    live_worker: WorkerOffer,
    make_job: MakeJob,
    make_seat: MakeSeat,
    endpoint: str,
    row: Row,
) -> None:
    job = make_job("somebody", video=row.finished, preview=row.preview)
    done = row.policy.refusal("ops") or row.done_open or row.done
    answer = send(client, endpoint, job.id, "", make_seat(endpoint), json=row.json)
    assert answer.status_code == done
