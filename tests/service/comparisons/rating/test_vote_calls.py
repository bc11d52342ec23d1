"""Test what a vote costs in calls to Redis, and that a call that is repeated changes nothing."""

from itertools import product

import pytest
from redis import Redis

from jobs.record import Failure, now
from service.comparisons.model import Arm, HalfState, Pair, PairState
from service.comparisons.rating.votes import Outcome, Response, VoteStore
from service.comparisons.statistics.criteria import BY_ID
from service.comparisons.store import ComparisonStore
from tests.service.comparisons.rating.conftest import MakeComparison, RaterClient, Seat


def test_a_vote_takes_two_calls_to_redis(
    make_comparison: MakeComparison, seat: Seat, redis: Redis
) -> None:
    ada = seat(make_comparison(prompts=8))
    calls = []
    for _ in range(5):
        item = ada.next()["item"]
        before = redis.info("stats")["total_reads_processed"]
        answer = ada.post(f"/rating/items/{item}/vote", {"answers": dict.fromkeys(BY_ID, "tie")})
        assert answer.status_code == 201, answer.text
        # One of them is that of `info` itself.
        calls.append(redis.info("stats")["total_reads_processed"] - before - 1)
    # What runs beside requests may add some to others.
    assert min(calls) == 2, calls


def test_votes_go_on_when_redis_has_lost_its_scripts(
    make_comparison: MakeComparison, seat: Seat, redis: Redis
) -> None:
    ada = seat(make_comparison())
    for done in (1, 2):
        item = ada.next()["item"]
        redis.script_flush()
        assert ada.vote(item).status_code == 201
        assert len(VoteStore(redis).answers(*_place(ada))) == done


def test_a_call_that_is_repeated_is_stored_once(
    make_comparison: MakeComparison, seat: Seat, redis: Redis
) -> None:
    ada = seat(make_comparison())
    item = ada.next()["item"]
    store = VoteStore(redis)
    response = Response(at=now(), choices={"overall": "left"})
    _, first, counted = store.answer(*_place(ada), item, response)
    assert store.answer(*_place(ada), item, response)[1:] == (Outcome.STORED, counted)
    assert first is Outcome.STORED
    other = Response(at=now(), choices={"overall": "right"})
    assert store.answer(*_place(ada), item, other)[1:] == (Outcome.ANSWERED, counted)
    (answer,) = store.answers(*_place(ada))
    assert answer.choices == {"overall": "left"}


@pytest.mark.parametrize("failure", [None, Failure(code="video_gone", detail="It is gone.")])
def test_the_script_knows_which_pairs_are_ready(
    failure: Failure | None,
    make_comparison: MakeComparison,
    seat: Seat,
    comparisons: ComparisonStore,
    redis: Redis,
) -> None:
    ada = seat(make_comparison())
    item = ada.next()["item"]
    store = VoteStore(redis)
    found = store.find(_place(ada)[0], item)
    assert found is not None
    pair_id = found[1].item.pair_id
    whole = comparisons.pair(_place(ada)[0], pair_id)
    copy = whole.reference.copy_
    ready = 0
    for one, two, with_copy in product(HalfState, HalfState, (True, False)):
        made = {"state": two, "copy_": copy if with_copy else None}
        pair = whole.with_half(Arm.REFERENCE, whole.reference.model_copy(update={"state": one}))
        pair = pair.with_half(Arm.CANDIDATE, whole.candidate.model_copy(update=made))
        pair = pair.model_copy(update={"failure": failure})
        comparisons.update_pair(_place(ada)[0], pair_id, lambda _, pair=pair: pair)  # type: ignore[misc]
        is_ready = _is_ready(comparisons, _place(ada)[0], pair)
        ready += is_ready
        _, outcome, _ = store.answer(*_place(ada), item, Response(at=now(), skipped=True))
        assert outcome is (Outcome.STORED if is_ready else Outcome.LEFT_OUT), pair
        if is_ready:
            store.undo(*_place(ada))
    assert ready == (0 if failure else 4)


def _place(rater: RaterClient) -> tuple[str, str]:
    """The comparison and the rater of a link."""
    comparison_id, rater_id, _ = rater.token.split(".")
    return comparison_id, rater_id


def _is_ready(comparisons: ComparisonStore, comparison_id: str, pair: Pair) -> bool:
    return comparisons.pair(comparison_id, pair.id).state is PairState.READY
