"""The simulated comparisons have the share that they are said to have."""

import random
from dataclasses import replace

import pytest

from benchmarks.quality.comparison_statistics import (
    EVEN,
    Size,
    World,
    measure,
    scenarios,
    simulate,
)
from service.comparisons.statistics.noninferiority import Bounds
from service.comparisons.statistics.votes import Ties

BOUNDS = Bounds(margin=0.1)


@pytest.mark.parametrize("ties", list(Ties))
@pytest.mark.parametrize("share", [0.25, 0.4, 0.5])
def test_simulated_votes_have_the_true_share(share: float, ties: Ties) -> None:
    world = replace(EVEN, share=share, ties=ties)
    rng = random.Random(0)
    given = [score.value for _ in range(150) for score in simulate(Size(20, 20, 10), world, rng)]
    assert sum(given) / len(given) == pytest.approx(share, abs=0.02)


def test_each_rater_judges_as_many_prompts_as_said() -> None:
    world = World(0.5, 0.3, 0.4, 0.0, Ties.LEFT_OUT)
    given = simulate(Size(5, 30, 12), world, random.Random(1))
    assert len(given) == 5 * 12
    assert len({(score.rater_id, score.prompt_id) for score in given}) == 5 * 12


def test_a_scenario_gives_rates_that_add_up() -> None:
    name, size, world = next(iter(scenarios(BOUNDS)))
    rows = {row.what.split(": ")[1]: row for row in measure(name, size, world, BOUNDS, 20, 100)}
    verdicts = ("non-inferior", "inferior", "inconclusive")
    assert sum(rows[verdict].value for verdict in verdicts) == pytest.approx(1.0)
    assert 0.5 < rows["coverage, clustered"].value <= 1.0
    assert rows["coverage, clustered"].baseline is not None


def test_scenarios_have_names_of_their_own() -> None:
    names = [name for name, *_ in scenarios(BOUNDS)]
    assert len(set(names)) == len(names)
