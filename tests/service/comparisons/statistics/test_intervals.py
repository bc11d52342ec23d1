"""Intervals agree with statsmodels and numpy, and with what was computed by hand."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.regression.linear_model import OLS
from statsmodels.stats.proportion import proportion_confint

from service.comparisons.statistics.intervals import (
    bootstrap_share,
    clustered_mean,
    clustered_share,
    quantile,
    wilson,
)
from service.comparisons.statistics.votes import Score, Ties, scores
from tests.service.comparisons.statistics.generated import mirrored_scores, votes_of

SEEDS = range(12)

ORACLE = settings(deadline=None)  # the first call of an oracle may be slow


@ORACLE
@given(st.integers(1, 3000), st.data(), st.floats(0.5, 0.999))
def test_wilson_is_that_of_statsmodels(trials: int, data: st.DataObject, level: float) -> None:
    successes = data.draw(st.integers(0, trials))
    interval = wilson(successes, trials, level)
    expected = proportion_confint(successes, trials, alpha=1 - level, method="wilson")
    assert interval is not None
    assert (interval.low, interval.high) == pytest.approx(expected, abs=1e-12)


def test_wilson_by_hand() -> None:
    # 8 of 10 at 95 %, as textbooks have it
    interval = wilson(8, 10)
    assert interval is not None
    assert (interval.low, interval.high) == pytest.approx((0.4902, 0.9433), abs=1e-4)


def test_wilson_without_votes() -> None:
    assert wilson(0, 0) is None


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("ties", list(Ties))
def test_the_variance_is_that_of_statsmodels(seed: int, ties: Ties) -> None:
    given_scores = scores(votes_of(seed, raters=8, prompts=15), ties)
    values = np.array([score.value for score in given_scores])
    groups = np.array(
        [(int(score.rater_id[1:]), int(score.prompt_id[1:])) for score in given_scores]
    )
    fit = OLS(values, np.ones(len(values))).fit(cov_type="cluster", cov_kwds={"groups": groups})
    share = clustered_share(given_scores)
    assert share is not None
    smoothed = (values.sum() + 1) / (len(values) + 2)
    variance = smoothed * (1 - smoothed) / share.effective_votes
    assert share.share == pytest.approx(values.mean())
    independent = variance / share.design_effect
    assert variance == pytest.approx(max(fit.cov_params()[0, 0], independent))


def test_independent_votes_are_the_least_variance() -> None:
    # Every rater wins once and loses once, and so does every prompt: no cluster differs at all.
    board = [Score(f"r{r}", f"p{p}", float((r + p) % 2)) for r in range(10) for p in range(10)]
    share = clustered_share(board)
    assert share is not None
    assert share.design_effect == 1.0
    assert share.effective_votes == pytest.approx(102)


def test_raters_of_one_mind_count_once_each() -> None:
    # Half of the raters always vote for the candidate, half never: 10 raters are 10 votes.
    given_scores = [Score(f"r{r}", f"p{p}", float(r < 5)) for r in range(10) for p in range(40)]
    share = clustered_share(given_scores)
    assert share is not None
    assert share.effective_votes == pytest.approx(9, rel=0.15)
    assert share.df == pytest.approx(9, rel=0.15)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_unanimous_votes_are_no_more_than_the_fewer_clusters(value: float) -> None:
    share = clustered_share([Score(f"r{r}", f"p{p}", value) for r in range(6) for p in range(20)])
    assert share is not None
    assert (share.effective_votes, share.df) == (6, 5)
    interval = share.interval(0.9)
    critical = stats.t.ppf(0.95, 5) ** 2
    bound = 6 / (6 + critical)
    assert (interval.low if value else 1 - interval.high) == pytest.approx(bound)
    assert (interval.high if value else 1 - interval.low) == pytest.approx(1.0)


def test_ties_alone_leave_an_interval_around_one_half() -> None:
    share = clustered_share([Score(f"r{r}", f"p{p}", 0.5) for r in range(5) for p in range(8)])
    assert share is not None
    interval = share.interval(0.9)
    assert 0.4 < interval.low < 0.5 < interval.high < 0.6
    assert share.p_value == 1.0


@pytest.mark.parametrize(
    "given_scores",
    [
        [],
        [Score("r0", "p0", 1.0)],
        [Score("r0", f"p{p}", p % 2) for p in range(30)],
        [Score(f"r{r}", "p0", r % 2) for r in range(30)],
    ],
    ids=["no votes", "one vote", "one rater", "one prompt"],
)
def test_too_little_to_know_how_raters_and_prompts_differ(given_scores: list[Score]) -> None:
    assert clustered_share(given_scores) is None
    assert bootstrap_share(given_scores, 0.9, 100, 0) is None


@pytest.mark.parametrize("seed", SEEDS)
def test_the_p_value_agrees_with_the_interval(seed: int) -> None:
    share = clustered_share(scores(votes_of(seed, mean=0.3), Ties.LEFT_OUT))
    assert share is not None
    interval = share.interval(1 - share.p_value)
    assert min(abs(interval.low - 0.5), abs(interval.high - 0.5)) < 1e-7


@pytest.mark.parametrize("seed", SEEDS)
def test_exchanging_the_modes_mirrors_the_intervals(seed: int) -> None:
    given_scores = scores(votes_of(seed, mean=0.3), Ties.HALF)
    share, other = clustered_share(given_scores), clustered_share(mirrored_scores(given_scores))
    assert share is not None
    assert other is not None
    interval, mirror = share.interval(0.9), other.interval(0.9)
    assert (mirror.low, mirror.high) == pytest.approx((1 - interval.high, 1 - interval.low))
    drawn = bootstrap_share(given_scores, 0.9, 200, seed)
    drawn_mirror = bootstrap_share(mirrored_scores(given_scores), 0.9, 200, seed)
    assert drawn is not None
    assert drawn_mirror is not None
    assert (drawn_mirror.low, drawn_mirror.high) == pytest.approx((1 - drawn.high, 1 - drawn.low))


def test_the_bootstrap_follows_its_seed_and_not_the_order_of_votes() -> None:
    given_scores = scores(votes_of(3), Ties.HALF)
    shuffled = random.Random(0).sample(given_scores, len(given_scores))
    first = bootstrap_share(given_scores, 0.9, 300, 1)
    assert first == bootstrap_share(shuffled, 0.9, 300, 1)
    assert first != bootstrap_share(given_scores, 0.9, 300, 2)


def test_the_bootstrap_is_what_numpy_draws() -> None:
    given_scores = scores(votes_of(4, raters=10, prompts=20), Ties.LEFT_OUT)
    raters = np.array([int(score.rater_id[1:]) for score in given_scores])
    prompts = np.array([int(score.prompt_id[1:]) for score in given_scores])
    values = np.array([score.value for score in given_scores])
    rng = np.random.default_rng(0)
    shares = []
    for _ in range(4000):
        rater_weights = np.bincount(rng.integers(0, 10, 10), minlength=10)
        prompt_weights = np.bincount(rng.integers(0, 20, 20), minlength=20)
        shares.append(np.average(values, weights=rater_weights[raters] * prompt_weights[prompts]))
    interval = bootstrap_share(given_scores, 0.9, 4000, 0)
    assert interval is not None
    expected = np.percentile(shares, [5, 95])
    assert (interval.low, interval.high) == pytest.approx(expected, abs=0.012)


def test_draws_without_any_vote_are_drawn_again() -> None:
    # Each rater judged a prompt of their own: many draws hold no pair of both.
    sparse = [Score("r0", "p0", 1.0), Score("r1", "p1", 0.0)]
    interval = bootstrap_share(sparse, 0.9, 100, 0)
    assert interval is not None
    assert (interval.low, interval.high) == (0.0, 1.0)


@ORACLE
@given(st.lists(st.floats(-5, 5), min_size=1, max_size=30), st.floats(0, 1))
def test_quantiles_are_those_of_numpy(values: list[float], probability: float) -> None:
    expected = np.quantile(values, probability)
    assert quantile(sorted(values), probability) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_mean_of_measures_is_that_of_statsmodels(seed: int) -> None:
    rng = np.random.default_rng(seed)
    clusters = rng.integers(0, 9, 60)
    values = rng.normal(30, 3, 60) + clusters
    fit = OLS(values, np.ones(60)).fit(
        cov_type="cluster", cov_kwds={"groups": clusters}, use_t=True
    )
    mean = clustered_mean([(f"p{c}", float(v)) for c, v in zip(clusters, values, strict=True)])
    assert mean is not None
    assert mean.interval is not None
    assert mean.mean == pytest.approx(values.mean())
    ends = (mean.interval.low, mean.interval.high)
    assert ends == pytest.approx(tuple(fit.conf_int(alpha=0.05)[0]))


def test_one_value_for_each_prompt_is_the_usual_interval() -> None:
    values = [31.0, 35.5, 28.0, 40.25, 33.0]
    mean = clustered_mean([(f"p{i}", value) for i, value in enumerate(values)])
    expected = stats.t.interval(0.95, 4, loc=np.mean(values), scale=stats.sem(values))
    assert mean is not None
    assert mean.interval is not None
    assert (mean.interval.low, mean.interval.high) == pytest.approx(expected)


def test_measures_of_no_prompt_and_of_one() -> None:
    assert clustered_mean([]) is None
    one = clustered_mean([("p0", 1.0), ("p0", 2.0)])
    assert one is not None
    assert (one.mean, one.interval) == (1.5, None)
