"""A result is plain JSON, follows from the votes alone, and says no more than they show."""

import json
import random
import re
from dataclasses import replace
from typing import Any

import pytest

from service.comparisons.statistics.criteria import BY_ID, CRITERIA
from service.comparisons.statistics.design import Design
from service.comparisons.statistics.noninferiority import Bounds
from service.comparisons.statistics.summary import PairMeasure, summarize
from service.comparisons.statistics.votes import Outcome, PairKind, Side, Ties, Vote
from tests.service.comparisons.statistics.generated import mirrored, votes_of

CRITERION = "motion_smoothness"
DESIGN = Design("w8a8", "bf16", (CRITERION, "overall"), Ties.LEFT_OUT, Bounds(margin=0.1))
BOTH = (CRITERION, "overall")


def of(outcome: Outcome, raters: int = 8, prompts: int = 20, criterion: str = CRITERION):
    return [
        Vote(f"p{p}", f"x{p}", f"r{r}", criterion, outcome, list(Side)[(p + r) % 2])
        for r in range(raters)
        for p in range(prompts)
    ]


def split(raters: int, prompts: int, criterion: str = CRITERION) -> list[Vote]:
    """Return votes of which every rater and every prompt has half wins."""
    return [
        replace(vote, outcome=(Outcome.WIN, Outcome.LOSS)[(int(vote.prompt_id[1:]) + r) % 2])
        for vote in of(Outcome.TIE, raters, prompts, criterion)
        for r in [int(vote.rater_id[1:])]
    ]


def result(votes: list[Vote], **changes: Any) -> dict[str, Any]:
    return summarize(votes, replace(DESIGN, **({"criteria": (CRITERION,)} | changes)))


def test_a_result_survives_json() -> None:
    found = summarize(votes_of(1, criteria=BOTH), DESIGN, [PairMeasure("p0", "x0", "psnr", 31.5)])
    assert json.loads(json.dumps(found, allow_nan=False)) == json.loads(
        json.dumps(found, default=str)
    )
    assert list(found["criteria"]) == list(BOTH)
    assert found["with_all_raters"]["criteria"] == found["criteria"]


def test_the_order_of_votes_does_not_matter() -> None:
    votes = votes_of(2, criteria=BOTH)
    shuffled = random.Random(0).sample(votes, len(votes))
    assert summarize(votes, DESIGN) == summarize(shuffled, DESIGN)


@pytest.mark.parametrize("ties", list(Ties))
@pytest.mark.parametrize("seed", range(4))
def test_exchanging_the_modes_mirrors_the_result(seed: int, ties: Ties) -> None:
    votes = votes_of(seed, mean=0.4)
    one, other = (
        result(each, criteria=("overall",), ties=ties)["criteria"]["overall"]
        for each in (votes, mirrored(votes))
    )
    assert one["outcomes"]["win"] == other["outcomes"]["loss"]
    assert one["outcomes"]["tie"] == other["outcomes"]["tie"]
    assert one["share"]["value"] == pytest.approx(1 - other["share"]["value"])
    for interval in ("interval", "bootstrap"):
        ends = one["share"][interval], other["share"][interval]
        assert ends[0]["low"] == pytest.approx(1 - ends[1]["high"])
    assert one["difference"] == pytest.approx(other["difference"])
    assert one["reliability"]["alpha_ordinal"] == pytest.approx(
        other["reliability"]["alpha_ordinal"]
    )


def test_ties_count_as_set() -> None:
    votes = [*of(Outcome.TIE, prompts=20), *split(8, 20)]
    for index, each in enumerate(votes[:160]):
        votes[index] = replace(each, prompt_id=f"t{each.prompt_id}", pair_id=f"t{each.pair_id}")
    wins = [v if v.outcome is Outcome.TIE else replace(v, outcome=Outcome.WIN) for v in votes]
    half = result(wins, ties=Ties.HALF)["criteria"][CRITERION]["share"]
    left_out = result(wins, ties=Ties.LEFT_OUT)["criteria"][CRITERION]["share"]
    assert (half["value"], half["counted"]) == (0.75, 320)
    assert (left_out["value"], left_out["counted"]) == (1.0, 160)


def test_non_inferior_in_one_sentence() -> None:
    found = result(split(16, 40))
    criterion = found["criteria"][CRITERION]
    assert criterion["verdict"] == found["conclusion"]["verdict"] == "non-inferior"
    assert criterion["bounds"]["lower"] > criterion["bounds"]["limit"] == 0.4
    assert criterion["bounds"]["confidence"] == 0.95
    low = 100 * criterion["bounds"]["lower"]
    assert criterion["sentence"] == (
        "Motion smoothness: w8a8 is non-inferior to bf16, since it won 50.0 % of 640 decisive"
        f" votes, with 95 % confidence more than {low:.1f} %, which is above the"
        " limit of 40.0 % that was fixed beforehand."
    )
    assert found["conclusion"]["sentence"] == (
        "w8a8 is non-inferior to bf16 within the margin of 10 points in motion smoothness."
    )
    assert criterion["votes_needed"]["missing"] == 0


def test_inferior_in_one_sentence() -> None:
    found = result(of(Outcome.LOSS))
    assert found["criteria"][CRITERION]["verdict"] == "inferior"
    assert (
        "w8a8 is inferior to bf16, since it won 0.0 % of 160"
        in found["criteria"][CRITERION]["sentence"]
    )
    assert found["conclusion"]["sentence"] == (
        "w8a8 is inferior to bf16 by more than the margin of 10 points in motion smoothness."
    )


def test_too_few_votes_are_inconclusive_and_say_how_many_are_planned() -> None:
    found = result(split(4, 10))
    criterion = found["criteria"][CRITERION]
    assert criterion["verdict"] == found["conclusion"]["verdict"] == "inconclusive"
    assert criterion["votes_needed"]["missing"] == 124
    assert criterion["sentence"].startswith("Motion smoothness: w8a8 may or may not be as good")
    assert criterion["sentence"].endswith("; by plan, 124 more decisive votes are needed.")
    assert found["conclusion"]["sentence"] == (
        "The votes do not show whether w8a8 is as good as bf16 within the margin of 10 points;"
        " open is motion smoothness."
    )


def test_one_open_criterion_leaves_the_whole_open() -> None:
    votes = [*split(16, 40), *split(4, 10, "overall")]
    found = summarize(votes, DESIGN)
    assert found["criteria"][CRITERION]["verdict"] == "non-inferior"
    assert found["conclusion"]["verdict"] == "inconclusive"
    assert found["conclusion"]["sentence"].endswith("open is overall.")


def test_one_inferior_criterion_makes_the_whole_inferior() -> None:
    votes = [*split(16, 40), *of(Outcome.LOSS, raters=12, criterion="overall")]
    assert summarize(votes, DESIGN)["conclusion"]["verdict"] == "inferior"


def test_barely_inferior_in_one_of_many_does_not_make_the_whole_inferior() -> None:
    """A limit that one of six exceeds by chance must not condemn the candidate."""
    names = tuple(BY_ID)
    losing = votes_of(11, raters=12, prompts=30, mean=-0.62)
    votes = [replace(vote, criterion=CRITERION) for vote in losing]
    found = summarize(votes, replace(DESIGN, criteria=(CRITERION,)))
    assert found["conclusion"]["verdict"] == "inferior"
    interval = found["criteria"][CRITERION]["share"]["interval"]
    # Move the limit just above the interval's end, so that the verdict hangs by a thread.
    margin = 0.5 - interval["high"] - 0.002
    design = replace(DESIGN, bounds=Bounds(margin))
    assert summarize(votes, replace(design, criteria=(CRITERION,)))["conclusion"]["verdict"] == (
        "inferior"
    )
    found = summarize(votes, replace(design, criteria=names))
    assert found["criteria"][CRITERION]["verdict"] == "inferior"
    assert found["conclusion"]["verdict"] == "inconclusive"


@pytest.mark.parametrize(
    "votes",
    [[], of(Outcome.WIN, raters=1), of(Outcome.WIN, prompts=1), of(Outcome.TIE)],
    ids=["no votes", "one rater", "one prompt", "only ties, left out"],
)
def test_what_cannot_be_judged_is_said(votes: list[Vote]) -> None:
    criterion = result(votes)["criteria"][CRITERION]
    assert criterion["verdict"] == "inconclusive"
    assert criterion["bounds"]["lower"] is None
    assert criterion["share"]["interval"] is criterion["share"]["bootstrap"] is None
    assert criterion["sentence"] == (
        "Motion smoothness: w8a8 cannot be judged yet, since that takes votes of at least two"
        " raters on at least two prompts."
    )
    assert criterion["difference"]["clustered"] == 1.0


def test_only_ties_as_half_show_that_nobody_saw_a_difference() -> None:
    assert result(of(Outcome.TIE), ties=Ties.HALF)["criteria"][CRITERION]["verdict"] == (
        "non-inferior"
    )


def test_checks_and_repeats_are_not_counted() -> None:
    votes = split(6, 20)
    repeats = [replace(vote, is_repeat=True) for vote in votes]
    checks = [
        replace(vote, pair_id=f"{kind}-{vote.pair_id}", kind=kind, outcome=Outcome.WIN)
        for vote in votes
        for kind in (PairKind.GOLD,)
    ]
    found = result([*votes, *repeats, *checks])["criteria"][CRITERION]
    plain = result(votes)["criteria"][CRITERION]
    assert found["votes"] == 120
    assert {**found, "reliability": None} == {**plain, "reliability": None}
    assert found["reliability"]["repeats"]["repeats"] == 120


def test_excluded_raters_are_named_and_their_votes_are_shown_beside() -> None:
    votes = split(6, 20)
    careless = [
        replace(vote, rater_id="careless", outcome=Outcome.LOSS)
        for vote in votes
        if vote.rater_id == "r0"
    ]
    gold = [
        replace(vote, kind=PairKind.GOLD, pair_id=f"gold-{vote.pair_id}") for vote in careless[:4]
    ]
    found = result([*votes, *careless, *gold])
    assert found["exclusions"] == [
        {
            "rater_id": "careless",
            "reasons": ["failed 4 of 4 gold pairs; at most 25 % are allowed"],
        }
    ]
    assert found["criteria"] == result(votes)["criteria"]
    assert found["with_all_raters"]["criteria"][CRITERION]["votes"] == 140
    assert set(found["with_all_raters"]) == {"criteria", "conclusion", "pairs"}


def test_pairs_come_worst_first() -> None:
    good, bad = of(Outcome.WIN, prompts=1), of(Outcome.LOSS, prompts=1)
    bad = [replace(vote, prompt_id="p9", pair_id="x9") for vote in bad]
    pairs = result([*good, *bad])["pairs"]
    assert [(pair["pair_id"], pair["share"]) for pair in pairs] == [("x9", 0.0), ("x0", 1.0)]
    assert pairs[0]["criteria"][CRITERION] == {"win": 0, "tie": 0, "loss": 8}


def test_measures_have_intervals_by_prompt() -> None:
    measures = [PairMeasure(f"p{i // 2}", f"x{i}", "psnr", 30.0 + i // 2) for i in range(6)]
    found = summarize([], DESIGN, measures)["measures"]
    assert found["psnr"]["mean"] == 31.0
    assert found["psnr"]["clusters"] == 3
    assert found["psnr"]["interval"]["low"] == pytest.approx(31 - 4.3027 * (1 / 3) ** 0.5, abs=1e-3)


def test_an_interval_of_a_measure_holds_only_values_that_there_can_be() -> None:
    """With two prompts Student's quantile is 12.7, and the interval wider than the measure."""
    measures = [
        PairMeasure(f"p{i}", f"x{i}", name, value)
        for name, values in {"ssim": (0.2, 0.99), "psnr_db": (3.0, 40.0)}.items()
        for i, value in enumerate(values)
    ]
    found = summarize([], DESIGN, measures)["measures"]
    assert (found["ssim"]["interval"]["low"], found["ssim"]["interval"]["high"]) == (-1.0, 1.0)
    assert found["psnr_db"]["interval"]["low"] == 0.0
    assert found["psnr_db"]["interval"]["high"] > 40.0


def test_holm_goes_over_the_criteria() -> None:
    found = summarize(votes_of(5, criteria=BOTH, mean=0.2), DESIGN)["criteria"]
    raw = sorted(each["difference"]["sign_flip"] for each in found.values())
    adjusted = sorted(each["difference"]["sign_flip_holm"] for each in found.values())
    assert adjusted[0] == pytest.approx(min(1.0, 2 * raw[0]))
    assert adjusted[1] == pytest.approx(max(adjusted[0], raw[1]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"criteria": ("beauty",)}, "criterion beauty is unknown; choose from overall_consistency"),
        ({"criteria": ()}, "criteria are []; name at least one, and none of them twice"),
        ({"criteria": ("overall",) * 2}, "criteria are ['overall', 'overall']; name at least one"),
        ({"bootstrap_draws": 10}, "bootstrap_draws is 10; choose from 100 to 20000"),
    ],
)
def test_a_design_that_makes_no_sense_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        replace(DESIGN, **changes)


def test_the_criteria_are_those_of_the_paper_in_one_sentence_each() -> None:
    assert [criterion.name for criterion in CRITERIA] == [
        "Overall consistency",
        "Subject consistency",
        "Motion smoothness",
        "Aesthetic quality",
        "Imaging quality",
    ]
    assert all(re.fullmatch(r"[A-Z][^.]+\.", criterion.definition) for criterion in BY_ID.values())
