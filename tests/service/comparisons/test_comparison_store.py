"""Comparisons in Redis: read back as they were, changed by many at once, deleted whole."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from redis import Redis

from jobs import redis_keys
from jobs.errors import ComparisonConflict, ComparisonNotFound, InvalidSpec
from jobs.record import Failure
from service.comparisons.model import (
    Arm,
    Comparison,
    ComparisonState,
    Half,
    HalfState,
    Pair,
    PairState,
    PixelMeasures,
    ViewingCopy,
)
from service.comparisons.store import ComparisonStore
from tests.service.comparisons.samples import sample_comparison, sample_pairs

COPY = ViewingCopy(key="comparisons/a/b.mp4", bytes=9, width=96, height=96, fps=8, num_frames=17)


@pytest.fixture
def comparisons(redis: Redis) -> ComparisonStore:
    return ComparisonStore(redis)


@pytest.fixture
def make(comparisons: ComparisonStore) -> Callable[..., Comparison]:
    def make(**changes: object) -> Comparison:
        comparison = sample_comparison(**changes)  # type: ignore[arg-type]
        comparisons.create(comparison, sample_pairs(comparison))
        return comparison

    return make


def test_what_is_read_is_what_was_stored(
    comparisons: ComparisonStore, make: Callable[..., Comparison]
) -> None:
    made = make(prompts=3, seeds=(1, 2**63 - 1))
    assert comparisons.get(made.id) == made
    pairs = comparisons.pairs(made.id)
    assert [(pair.number, pair.prompt_id, pair.seed) for pair in pairs] == [
        (1, "1", 1), (2, "1", 2**63 - 1), (3, "2", 1), (4, "2", 2**63 - 1),
        (5, "3", 1), (6, "3", 2**63 - 1),
    ]  # fmt: skip
    assert comparisons.pair(made.id, pairs[2].id) == pairs[2]
    assert comparisons.open_ids() == (made.id,)


def test_pages_are_newest_first(
    comparisons: ComparisonStore, make: Callable[..., Comparison]
) -> None:
    ids = [make().id for _ in range(5)]
    first = comparisons.list(limit=2)
    second = comparisons.list(limit=3, cursor=first.next_cursor)
    assert [each.id for each in first.comparisons + second.comparisons] == sorted(ids)[::-1]
    assert second.next_cursor is None
    with pytest.raises(InvalidSpec, match="1 to 100"):
        comparisons.list(limit=101)


def test_states_change_only_where_allowed(
    comparisons: ComparisonStore, make: Callable[..., Comparison]
) -> None:
    made = make()
    running, closed = ComparisonState.RUNNING, ComparisonState.CLOSED
    assert comparisons.change_state(made.id, closed, [running]).state is closed
    comparisons.settle(made.id, lambda pairs: len(pairs) == 2)
    assert comparisons.open_ids() == ()
    assert comparisons.change_state(made.id, closed, [running]).state is closed
    with pytest.raises(ComparisonConflict, match="is closed, so it cannot be resumed"):
        comparisons.change_state(made.id, running, [ComparisonState.PAUSED])
    assert comparisons.get(made.id).state is closed


def test_a_problem_is_noted_and_taken_back(
    comparisons: ComparisonStore, make: Callable[..., Comparison]
) -> None:
    made = make()
    comparisons.set_problem(made.id, "No live worker serves w8a8.")
    assert comparisons.get(made.id).problem == "No live worker serves w8a8."
    comparisons.set_problem(made.id, None)
    assert comparisons.get(made.id) == made


def test_no_change_of_a_pair_is_lost_when_many_make_them(
    comparisons: ComparisonStore, make: Callable[..., Comparison]
) -> None:
    made = make()
    pair_id = comparisons.pairs(made.id)[0].id

    def ask_again(pair: Pair) -> Pair:
        half = pair.reference
        return pair.with_half(Arm.REFERENCE, half.model_copy(update={"attempt": half.attempt + 1}))

    with ThreadPoolExecutor(4) as threads:
        for each in [
            threads.submit(comparisons.update_pair, made.id, pair_id, ask_again) for _ in range(40)
        ]:
            each.result()
    assert comparisons.pair(made.id, pair_id).reference.attempt == 40


def test_nothing_is_left_of_a_deleted_comparison_and_nothing_written_to_it(
    redis: Redis, comparisons: ComparisonStore, make: Callable[..., Comparison]
) -> None:
    made, other = make(), make()
    redis.set(redis_keys.comparison_part(made.id, "votes:rater"), "x")
    pair_id = comparisons.pairs(made.id)[0].id
    comparisons.delete(made.id)
    comparisons.delete(made.id)
    assert not comparisons.exists(made.id)
    for attempt in (
        lambda: comparisons.get(made.id),
        lambda: comparisons.get("../etc"),
        lambda: comparisons.update_pair(made.id, pair_id, lambda pair: pair),
        lambda: comparisons.set_problem(made.id, "x"),
        lambda: comparisons.change_state(made.id, ComparisonState.PAUSED, list(ComparisonState)),
    ):
        with pytest.raises(ComparisonNotFound):
            attempt()
    assert not [key for key in redis.scan_iter() if made.id.encode() in key]
    assert [each.id for each in comparisons.list().comparisons] == [other.id]
    assert comparisons.open_ids() == (other.id,)


@pytest.mark.parametrize(
    ("halves", "state"),
    [
        ((Half(), Half()), PairState.WAITING),
        ((Half(state=HalfState.SUCCEEDED), Half()), PairState.WAITING),
        ((Half(state=HalfState.FAILED), Half(state=HalfState.RUNNING)), PairState.RUNNING),
        ((Half(state=HalfState.QUEUED), Half()), PairState.RUNNING),
        ((Half(state=HalfState.SUCCEEDED), Half(state=HalfState.FAILED)), PairState.FAILED),
        ((Half(state=HalfState.CANCELLED), Half()), PairState.FAILED),
        ((Half(state=HalfState.SUCCEEDED),) * 2, PairState.MADE),
        ((Half(state=HalfState.SUCCEEDED, copy_=COPY),) * 2, PairState.READY),
    ],
)
def test_a_pair_has_the_state_of_its_halves(halves: tuple[Half, Half], state: PairState) -> None:
    pair = Pair(id="0" * 16, number=1, reference=halves[0], candidate=halves[1])
    assert pair.state is state
    assert Pair.model_validate_json(pair.model_dump_json(exclude_none=True)) == pair


def test_a_pair_of_equal_videos_is_read_as_it_was(
    comparisons: ComparisonStore, make: Callable[..., Comparison]
) -> None:
    made = make()
    pair = comparisons.pairs(made.id)[0]
    equal = PixelMeasures(psnr_db=None, ssim=1)
    comparisons.update_pair(
        made.id, pair.id, lambda found: found.model_copy(update={"measures": equal})
    )
    assert comparisons.pair(made.id, pair.id).measures == equal


def test_a_pair_whose_copies_failed_is_failed() -> None:
    half = Half(state=HalfState.SUCCEEDED)
    failure = Failure(code="video_gone", detail="The video was deleted.")
    pair = Pair(id="0" * 16, number=1, reference=half, candidate=half, failure=failure)
    assert pair.state is PairState.FAILED
