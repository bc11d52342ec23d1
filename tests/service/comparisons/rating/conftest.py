"""Define fixtures of raters' tests: a comparison whose pairs are ready, and raters over HTTP."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fastapi.testclient import TestClient
from redis import Redis

from jobs.artifacts.store import open_artifacts
from service.auth.api_keys import Role
from service.comparisons.model import (
    Arm,
    Comparison,
    HalfState,
    Pair,
    PairKind,
    ViewingCopy,
)
from service.comparisons.store import ComparisonStore, new_pair_id
from service.settings import ServiceSettings
from tests.service.comparisons.samples import sample_comparison, sample_pairs
from tests.service.conftest import MakeKey, cookie_in

COPY_BYTES = 1024
MakeComparison = Callable[..., Comparison]


def with_copies(comparison: Comparison, pair: Pair, job: str | None = None) -> Pair:
    """The pair once its copies are made."""
    for arm in Arm:
        name = comparison.opaque("copy", pair.id, arm.value)
        copy = ViewingCopy(
            key=f"comparisons/{comparison.id}/{name}.mp4",
            bytes=COPY_BYTES,
            width=96,
            height=96,
            fps=8,
            num_frames=17,
        )
        half = pair.half(arm).model_copy(
            update={"copy_": copy, "state": HalfState.SUCCEEDED, "job_id": job}
        )
        pair = pair.with_half(arm, half)
    return pair


def other_pairs(comparison: Comparison, first: Pair) -> list[Pair]:
    """The pairs besides the test pairs that the plan of rating asks for, all made from one."""
    rating = comparison.rating
    kinds = [PairKind.GOLD] * rating.gold + [PairKind.IDENTICAL] * rating.identical
    kinds += [PairKind.TRAINING] * rating.training
    return [
        Pair(
            id=new_pair_id(),
            number=1000 + number,
            kind=kind,
            prompt_id=first.prompt_id,
            seed=first.seed,
            source=first.id,
        )
        for number, kind in enumerate(kinds)
    ]


def all_pairs(comparison: Comparison) -> list[Pair]:
    """Every pair of a comparison, ready to be shown."""
    tests = sample_pairs(comparison)
    pairs = [*tests, *other_pairs(comparison, tests[0])]
    return [with_copies(comparison, pair) for pair in pairs]


@pytest.fixture
def comparisons(redis: Redis) -> ComparisonStore:
    return ComparisonStore(redis)


@pytest.fixture
def make_comparison(comparisons: ComparisonStore) -> MakeComparison:
    """Store a comparison whose pairs are ready, without files."""

    def make(prompts: int = 4, **changes: Any) -> Comparison:
        comparison = sample_comparison(prompts, **changes)
        comparisons.create(comparison, all_pairs(comparison))
        return comparison

    return make


@pytest.fixture
def put_files(
    settings: ServiceSettings, comparisons: ComparisonStore, tmp_path: Path
) -> Callable[[Comparison], None]:
    """Store a file for every viewing copy; its first byte tells the halves apart."""

    def put(comparison: Comparison) -> None:
        store = open_artifacts(settings.artifacts_url)
        for pair in comparisons.pairs(comparison.id):
            for arm in Arm:
                copy = pair.half(arm).copy_
                assert copy is not None
                made = tmp_path / "copy.mp4"
                made.write_bytes(arm.value[:1].encode() * copy.bytes)
                store.put(copy.key, made)

    return put


@dataclass
class RaterClient:
    """A rater's browser: the service, with the headers of the rater's session."""

    client: TestClient
    headers: dict[str, str]
    id: str
    token: str

    def get(self, path: str, **headers: str) -> httpx2.Response:
        return self.client.get(path, headers=self.headers | headers)

    def post(self, path: str, body: object = None) -> httpx2.Response:
        return self.client.post(path, json=body, headers=self.headers)

    def next(self) -> dict[str, Any]:
        answer = self.get("/rating/next")
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def vote(self, item: str, choice: str = "tie", **extra: object) -> httpx2.Response:
        criteria = [each["id"] for each in self.get("/rating").json()["comparison"]["criteria"]]
        body = {"answers": dict.fromkeys(criteria, choice), **extra}
        return self.post(f"/rating/items/{item}/vote", body)

    def all_items(self, choice: str = "tie") -> list[dict[str, Any]]:
        """Vote on everything there is, and return what was shown."""
        shown = []
        while (answer := self.get("/rating/next")).status_code == 200:
            shown.append(answer.json())
            assert self.vote(shown[-1]["item"], choice).status_code == 201
        assert answer.status_code == 204
        return shown


Seat = Callable[..., RaterClient]


@pytest.fixture
def ops(make_key: MakeKey) -> dict[str, str]:
    return make_key("ops", Role.OPS)


def join(client: TestClient, token: str) -> dict[str, str]:
    """Open a link as its page does; return the headers that the browser then sends."""
    answer = client.post("/rating/join", json={"token": token})
    assert answer.status_code == 200, answer.text
    client.cookies.clear()
    return {"Cookie": cookie_in(answer), "Sec-Fetch-Site": "same-origin"}


@pytest.fixture
def seat(client: TestClient, ops: dict[str, str]) -> Seat:
    """Add a rater to a comparison, and open the link."""

    def make(comparison: Comparison, name: str = "Ada") -> RaterClient:
        answer = client.post(
            f"/comparisons/{comparison.id}/raters", json={"name": name}, headers=ops
        )
        assert answer.status_code == 201, answer.text
        address, _, token = answer.json()["url"].partition("#")
        assert address == "http://testserver/rate"
        return RaterClient(client, join(client, token), answer.json()["id"], token)

    return make
