"""Test the report and the exports end to end: raters vote over HTTP, and the numbers are theirs."""

import csv
import io
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from fastapi.testclient import TestClient
from redis import Redis

from jobs.record import Failure
from service.comparisons.model import Comparison, Pair, PairKind, PixelMeasures, RatingPlan
from service.comparisons.rating import report
from service.comparisons.rating.export import COLUMNS
from service.comparisons.rating.votes import VoteStore
from service.comparisons.statistics.design import Design
from service.comparisons.statistics.noninferiority import Bounds
from service.comparisons.statistics.summary import PairMeasure, summarize
from service.comparisons.statistics.votes import Outcome, Side, Ties, Vote
from service.comparisons.statistics.votes import PairKind as VoteKind
from service.comparisons.store import ComparisonStore
from tests.service.comparisons.rating.conftest import MakeComparison, RaterClient, Seat

CRITERIA = ("overall", "motion_smoothness")
RATING = RatingPlan(training=1, repeat_share=0.25, identical=1, gold=3)
OTHER = {"left": "right", "right": "left"}


@dataclass
class Judge:
    """Votes by what it sees in the videos: the first byte of a copy is that of its half."""

    rater: RaterClient
    votes: VoteStore
    comparison: Comparison
    preference: float
    rng: random.Random

    def judge_all(self) -> list[Vote]:
        """Vote on everything, and return the votes as the statistics take them."""
        given = []
        while (answer := self.rater.get("/rating/next")).status_code == 200:
            item = answer.json()
            choices = {name: self._choice(item) for name in CRITERIA}
            path = f"/rating/items/{item['item']}/vote"
            seen = {"frames_seen": [17, 17], "seconds_watched": 8}
            done = self.rater.post(path, {"answers": choices, "provenance": seen})
            assert done.status_code == 201, done.text
            given += self._as_votes(item, choices)
        return given

    def _choice(self, item: dict[str, Any]) -> str:
        found = self.votes.find(self.comparison.id, item["item"])
        assert found is not None
        candidate, drawn = self._candidate_side(item), self.rng.random()
        if found[1].item.kind is PairKind.GOLD:
            return candidate
        if drawn < 0.2 or found[1].item.kind is PairKind.IDENTICAL:
            return "tie"
        return candidate if self.rng.random() < self.preference else OTHER[candidate]

    def _candidate_side(self, item: dict[str, Any]) -> str:
        first = self.rater.get(item["left"]["url"], Range="bytes=0-0").content
        return "left" if first == b"c" else "right"

    def _as_votes(self, item: dict[str, Any], choices: dict[str, str]) -> list[Vote]:
        found = self.votes.find(self.comparison.id, item["item"])
        assert found is not None
        shown, side = found[1].item, self._candidate_side(item)
        if shown.kind is PairKind.TRAINING:
            return []
        outcomes = {"tie": Outcome.TIE, side: Outcome.WIN, OTHER[side]: Outcome.LOSS}
        (prompt,) = (p.id for p in self.comparison.prompts if p.prompt == item["prompt"])
        return [
            Vote(
                prompt_id=prompt,
                pair_id=shown.pair_id,
                rater_id=self.rater.id,
                criterion=name,
                outcome=outcomes[choice],
                candidate_side=Side(side),
                is_repeat=shown.is_repeat,
                kind=VoteKind(shown.kind.value),
            )
            for name, choice in choices.items()
        ]


@pytest.fixture
def judged(
    make_comparison: MakeComparison,
    put_files: Callable[[Comparison], None],
    seat: Seat,
    redis: Redis,
) -> Callable[..., tuple[Comparison, list[Vote]]]:
    """Let raters judge a comparison; one of them answers against what it sees in gold pairs."""

    def judge(preferences: list[float], **changes: Any) -> tuple[Comparison, list[Vote]]:
        comparison = make_comparison(8, criteria=CRITERIA, rating=RATING, **changes)
        put_files(comparison)
        votes = []
        for number, preference in enumerate(preferences):
            rater = seat(comparison, f"rater {number}")
            judge = Judge(rater, VoteStore(redis), comparison, preference, random.Random(number))
            votes += judge.judge_all()
        return comparison, votes

    return judge


def test_the_numbers_are_those_of_the_votes(
    judged: Callable[..., tuple[Comparison, list[Vote]]],
    client: TestClient,
    ops: dict[str, str],
    comparisons: ComparisonStore,
) -> None:
    comparison, votes = judged([0.3, 0.5, 0.4, 0.6], margin=0.2, ties=Ties.LEFT_OUT)
    measures = []
    for number, pair in enumerate(comparisons.pairs(comparison.id)):
        if pair.kind is PairKind.TEST:
            psnr = None if number == 0 else 30.0 + number
            found = PixelMeasures(psnr_db=psnr, ssim=0.9)

            def measured(pair: Pair, found: PixelMeasures = found) -> Pair:
                return pair.model_copy(update={"measures": found})

            comparisons.update_pair(comparison.id, pair.id, measured)
            values = {"psnr_db": psnr, "ssim": 0.9}
            measures += [
                PairMeasure(pair.prompt_id or "", pair.id, name, value)
                for name, value in values.items()
                if value is not None
            ]
    path = f"/comparisons/{comparison.id}/report"
    answer = client.get(path, headers=ops)
    assert answer.status_code == 200
    found_report = answer.json()
    design = Design(
        candidate="w8a8",
        reference="bf16",
        criteria=CRITERIA,
        ties=Ties.LEFT_OUT,
        bounds=Bounds(0.2),
        seed=int(comparison.opaque("statistics")[:8], 16),
    )
    random.Random(1).shuffle(votes)
    assert found_report["result"] == json.loads(json.dumps(summarize(votes, design, measures)))
    tests = [v for v in votes if v.kind is VoteKind.TEST and not v.is_repeat]
    overall = found_report["result"]["criteria"]["overall"]
    assert overall["votes"] == 4 * 8 == len(tests) / 2
    wins = sum(v.outcome is Outcome.WIN for v in tests if v.criterion == "overall")
    assert overall["outcomes"]["win"]["votes"] == wins
    assert found_report["answers"] == {
        **{"votes": 4 * (1 + 8 + 2 + 1 + 3), "skips": 0, "counted": 4 * 14},
        "left_out": [{"reason": "training", "votes": 4}],
    }
    shares = [row["share"] for row in found_report["prompts"]]
    assert shares == sorted(shares)
    worst = found_report["prompts"][0]
    (pair,) = worst["pairs"]
    assert pair["pair_id"] == found_report["result"]["pairs"][0]["pair_id"]
    assert set(pair) >= {"seed", "jobs", "measures", "state", "criteria"}
    names = [each["id"] for each in found_report["comparison"]["criteria"]]
    assert names == list(CRITERIA)


def test_a_report_is_made_again_only_when_something_changed(
    judged: Callable[..., tuple[Comparison, list[Vote]]],
    client: TestClient,
    ops: dict[str, str],
    seat: Seat,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    comparison, _ = judged([0.5])
    made = []

    def counting(*args: Any) -> Any:
        made.append(args)
        return summarize(*args)

    monkeypatch.setattr(report, "summarize", counting)
    path = f"/comparisons/{comparison.id}/report"
    first = client.get(path, headers=ops).json()
    assert client.get(path, headers=ops).json() == first
    assert len(made) == 1
    bob = seat(comparison, "Bob")
    criteria = {"answers": dict.fromkeys(CRITERIA, "tie")}
    bob.post(f"/rating/items/{bob.next()['item']}/vote", criteria)
    second = client.get(path, headers=ops).json()
    assert second["fingerprint"] != first["fingerprint"]
    bob.post("/rating/undo")
    assert client.get(path, headers=ops).json()["answers"] == first["answers"]
    assert len(made) == 3


def test_who_fails_the_checks_is_left_out_and_the_result_with_all_stands_beside(
    judged: Callable[..., tuple[Comparison, list[Vote]]],
    client: TestClient,
    ops: dict[str, str],
    seat: Seat,
) -> None:
    comparison, _ = judged([0.5, 0.5])
    careless = seat(comparison, "Careless")
    careless.all_items("left")
    found = client.get(f"/comparisons/{comparison.id}/report", headers=ops).json()
    (excluded,) = found["result"]["exclusions"]
    assert excluded["rater_id"] == careless.id
    row = found["raters"][-1]
    assert (row["name"], row["excluded"], row["reasons"]) == ("Careless", True, excluded["reasons"])
    assert found["result"]["criteria"]["overall"]["votes"] == 16
    assert found["result"]["with_all_raters"]["criteria"]["overall"]["votes"] == 24
    assert sum(prompt["votes"] for prompt in found["prompts"]) == 16 * len(CRITERIA)


def test_votes_without_watching_are_left_out_if_the_comparison_says_so(
    make_comparison: MakeComparison, seat: Seat, client: TestClient, ops: dict[str, str]
) -> None:
    rating = RatingPlan(training=0, gold=0, identical=0, repeat_share=0, least_seen=0.5)
    comparison = make_comparison(4, criteria=("overall",), rating=rating)
    ada = seat(comparison)
    for frames in ([17, 17], [9, 9], [8, 17], None):
        body: dict[str, Any] = {"answers": {"overall": "tie"}, "provenance": {}}
        if frames is not None:
            body["provenance"]["frames_seen"] = frames
        assert ada.post(f"/rating/items/{ada.next()['item']}/vote", body).status_code == 201
    found = client.get(f"/comparisons/{comparison.id}/report", headers=ops).json()
    assert found["answers"]["left_out"] == [{"reason": report.NOT_SEEN, "votes": 2}]
    assert found["result"]["criteria"]["overall"]["votes"] == 2


def test_pairs_that_failed_are_left_out(
    make_comparison: MakeComparison,
    seat: Seat,
    client: TestClient,
    ops: dict[str, str],
    comparisons: ComparisonStore,
) -> None:
    rating = RatingPlan(training=0, gold=0, identical=0, repeat_share=0)
    comparison = make_comparison(3, criteria=("overall",), rating=rating)
    seat(comparison).all_items()
    broken = comparisons.pairs(comparison.id)[0]
    failure = Failure(code="video_gone", detail="It is gone.")
    comparisons.update_pair(
        comparison.id, broken.id, lambda pair: pair.model_copy(update={"failure": failure})
    )
    found = client.get(f"/comparisons/{comparison.id}/report", headers=ops).json()
    assert found["pairs"]["failed"] == 1
    assert found["answers"]["left_out"] == [{"reason": report.FAILED, "votes": 1}]
    last = found["prompts"][-1]
    assert (last["prompt_id"], last["share"], last["pairs"][0]["state"]) == ("1", None, "failed")


def test_a_report_without_votes(
    make_comparison: MakeComparison, client: TestClient, ops: dict[str, str]
) -> None:
    comparison = make_comparison()
    found = client.get(f"/comparisons/{comparison.id}/report", headers=ops).json()
    assert found["result"]["conclusion"]["verdict"] == "inconclusive"
    assert found["answers"] == {"votes": 0, "skips": 0, "counted": 0, "left_out": []}
    assert [row["share"] for row in found["prompts"]] == [None] * 4


EVIL = ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", " =1", 'é, "quoted"\nline', "plain"]


def test_exports_hold_every_answer_and_no_formula(
    make_comparison: MakeComparison, seat: Seat, client: TestClient, ops: dict[str, str]
) -> None:
    rating = RatingPlan(training=1, gold=0, identical=0, repeat_share=0)
    comparison = make_comparison(len(EVIL), criteria=CRITERIA, rating=rating)
    ada = seat(comparison, "=HYPERLINK()")
    seen = {"frames_seen": [17, 16], "viewport": [800, 600], "speed": 0.5, "further": {"a": "=1"}}
    for reason in (None, *EVIL):
        path = f"/rating/items/{ada.next()['item']}"
        if reason is None:
            body = {"answers": {"overall": "left", "motion_smoothness": "tie"}, "provenance": seen}
            assert ada.post(f"{path}/vote", body).status_code == 201
        else:
            assert ada.post(f"{path}/skip", {"reason": reason}).status_code == 201
    export = client.get(f"/comparisons/{comparison.id}/export.csv", headers=ops)
    assert export.headers["content-type"] == "text/csv; charset=utf-8"
    assert "attachment" in export.headers["content-disposition"]
    rows = list(csv.DictReader(io.StringIO(export.content.decode("utf-8"), newline="")))
    assert tuple(rows[0]) == COLUMNS
    assert len(rows) == 2 + len(EVIL)
    for row in rows:
        for value in row.values():
            assert not value.lstrip(" ").startswith(("=", "+", "-", "@", "\t", "\r")), value
    assert [row["skip_reason"].removeprefix("'") for row in rows[2:]] == EVIL
    assert rows[0]["rater"] == "'=HYPERLINK()"
    vote = {name: rows[0][name] for name in ("criterion", "choice", "kind", "left_out", "speed")}
    assert vote == {
        **{"criterion": "overall", "choice": "left", "kind": "training"},
        **{"left_out": "training", "speed": "0.5"},
    }
    assert rows[0]["outcome"] == ("win" if rows[0]["candidate_side"] == "left" else "loss")
    lines = client.get(f"/comparisons/{comparison.id}/export.jsonl", headers=ops)
    records = [json.loads(line) for line in lines.content.decode("utf-8").splitlines()]
    assert len(records) == 1 + len(EVIL)
    assert records[0]["choices"] == {"overall": "left", "motion_smoothness": "tie"}
    assert records[0]["provenance"]["further"] == {"a": "=1"}
    assert [each["skip_reason"] for each in records[1:]] == EVIL
