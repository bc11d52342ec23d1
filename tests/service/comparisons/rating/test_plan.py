"""Test what a rater is shown: order, sides, repeats, checks, and pairs that get ready later."""

import random
from collections import Counter
from typing import Any

import pytest

from service.comparisons.model import Arm, Comparison, Pair, PairKind, RatingPlan
from service.comparisons.rating.sessions import REPEAT_DISTANCE, Item, expected_items, plan
from tests.service.comparisons.rating.conftest import all_pairs
from tests.service.comparisons.samples import sample_comparison

RATERS = [f"{number:012x}" for number in range(40)]


def world(prompts: int = 30, **rating: Any) -> tuple[Comparison, list[Pair]]:
    settings: dict[str, Any] = {"training": 3, "repeat_share": 0.2, "identical": 4, "gold": 3}
    comparison = sample_comparison(prompts, rating=RatingPlan(**settings | rating))
    return comparison, all_pairs(comparison)


def unready(pair: Pair) -> Pair:
    half = pair.candidate.model_copy(update={"copy_": None})
    return pair.with_half(Arm.CANDIDATE, half)


def firsts(items: Any) -> list[Item]:
    return [item for item in items if item.kind is PairKind.TEST and not item.is_repeat]


def test_what_a_plan_holds() -> None:
    comparison, pairs = world()
    for rater in RATERS:
        found = plan(comparison, rater, pairs)
        items = found.items
        kinds = Counter((item.kind, item.is_repeat) for item in items)
        assert kinds == {
            (PairKind.TRAINING, False): 3,
            (PairKind.TEST, False): 30,
            (PairKind.TEST, True): 6,
            (PairKind.IDENTICAL, False): 4,
            (PairKind.GOLD, False): 3,
        }
        assert all(item.is_training for item in items[:3])
        assert len({(item.pair_id, item.is_repeat) for item in items}) == len(items)
        assert found.expected == len(items) - 3 == expected_items(comparison, pairs)
        assert not found.is_waiting


def test_repeats_come_at_a_distance_with_the_sides_swapped() -> None:
    comparison, pairs = world()
    for rater in RATERS:
        items = plan(comparison, rater, pairs).items
        first = {item.pair_id: (at, item) for at, item in enumerate(items) if not item.is_repeat}
        for at, item in enumerate(items):
            if item.is_repeat:
                before, shown = first[item.pair_id]
                assert at - before > REPEAT_DISTANCE
                assert item.candidate_left is not shown.candidate_left


def test_sides_are_balanced_from_the_start_and_drawn_for_each_rater() -> None:
    comparison, pairs = world()
    left_of_pair: Counter[str] = Counter()
    for rater in RATERS:
        items = plan(comparison, rater, pairs).items
        for kind in PairKind:
            lead = 0
            for item in items:
                if item.kind is kind and not item.is_repeat:
                    lead += 1 if item.candidate_left else -1
                    if kind is PairKind.TEST:
                        assert abs(lead) <= 1
            assert abs(lead) <= 1, kind
        left_of_pair.update(item.pair_id for item in firsts(items) if item.candidate_left)
    # 40 raters: each pair is on the left for about half of them (6 sigma: 1 to 39).
    assert len(left_of_pair) == 30
    assert all(4 <= count <= 36 for count in left_of_pair.values())


def test_each_rater_has_an_order_of_ones_own_without_a_pattern() -> None:
    comparison, pairs = world()
    orders = {
        tuple(item.pair_id for item in plan(comparison, rater, pairs).items) for rater in RATERS
    }
    assert len(orders) == len(RATERS)
    # Checks are spread: their mean place is the middle, and they are neither first nor last.
    places = [
        (at - 3) / 42
        for rater in RATERS
        for at, item in enumerate(plan(comparison, rater, pairs).items)
        if item.kind in (PairKind.GOLD, PairKind.IDENTICAL)
    ]
    assert sum(places) / len(places) == pytest.approx(0.5, abs=0.07)


def test_another_secret_is_another_plan() -> None:
    comparison, pairs = world()
    other = comparison.model_copy(update={"secret": "6" * 32})
    assert plan(comparison, RATERS[0], pairs) == plan(comparison, RATERS[0], pairs[::1])
    assert plan(comparison, RATERS[0], pairs) != plan(other, RATERS[0], pairs)


def test_the_plan_stays_while_it_is_followed() -> None:
    comparison, pairs = world()
    for rater in RATERS[:5]:
        items = plan(comparison, rater, pairs).items
        for done in range(len(items)):
            assert plan(comparison, rater, pairs, items[:done]).items == items


@pytest.mark.parametrize("seed", range(6))
def test_pairs_that_get_ready_later_change_nothing_of_what_was_given(seed: int) -> None:
    comparison, pairs = world()
    rng = random.Random(seed)
    ready = {pair.id for pair in pairs if pair.kind is PairKind.TRAINING}
    given: list[Item] = []
    waited = 0
    while True:
        now = [pair if pair.id in ready else unready(pair) for pair in pairs]
        found = plan(comparison, RATERS[0], now, given)
        assert list(found.items[: len(given)]) == given
        assert found.expected == 30 + 6 + 7
        rest = found.items[len(given) :]
        assert all(item.pair_id in ready for item in rest)
        if not rest and not found.is_waiting:
            break
        waited += not rest
        given.extend(rest[: rng.randint(0, 3)])
        ready.update(rng.sample([pair.id for pair in pairs], 1))
    assert waited
    kinds = Counter((item.kind, item.is_repeat) for item in given)
    assert kinds[PairKind.TEST, False] == 30
    assert kinds[PairKind.TEST, True] == 6
    assert len(given) == 3 + 30 + 6 + 7
    lead = sum(1 if item.candidate_left else -1 for item in firsts(given))
    assert lead == 0


def test_training_is_waited_for_but_not_gone_back_to() -> None:
    comparison, pairs = world()
    partly = [
        unready(pair) if pair.kind is PairKind.TRAINING and number % 2 else pair
        for number, pair in enumerate(pairs)
    ]
    found = plan(comparison, RATERS[0], partly)
    assert (found.items, found.is_waiting) == ((), True)
    rated = [item for item in plan(comparison, RATERS[0], pairs).items if not item.is_training]
    later = plan(comparison, RATERS[0], pairs, rated[:2])
    assert not any(item.is_training for item in later.items)


def test_a_rater_gets_as_many_pairs_as_set() -> None:
    comparison, pairs = world(per_rater=10)
    seen: Counter[str] = Counter()
    for rater in RATERS:
        found = plan(comparison, rater, pairs)
        assert len(firsts(found.items)) == 10
        assert found.expected == 10 + 2 + 7
        seen.update(item.pair_id for item in firsts(found.items))
    assert len(seen) == 30, "together, raters see all pairs"


def test_small_and_empty_comparisons() -> None:
    for prompts in (1, 2, 3):
        comparison, pairs = world(prompts, repeat_share=0.5, gold=0, identical=0, training=0)
        items = plan(comparison, RATERS[0], pairs).items
        assert len(items) == prompts + round(prompts / 2)
        at = {(item.pair_id, item.is_repeat): place for place, item in enumerate(items)}
        assert all(at[name, False] < place for (name, again), place in at.items() if again)
    comparison, pairs = world()
    nothing = plan(comparison, RATERS[0], [unready(pair) for pair in pairs])
    assert (nothing.items, nothing.is_waiting) == ((), True)
