"""Serve one rater: show the next pair, take the answer, take it back, say how far it is.

Everything that a rater is told comes from here, and nothing of it follows from the modes.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Final, Literal

from redis import Redis

from jobs.errors import (
    AlreadyVoted,
    ComparisonConflict,
    ComparisonNotFound,
    Forbidden,
    InvalidSpec,
    ItemNotFound,
    NothingToUndo,
    PairLeftOut,
    StoreUnavailable,
    Violation,
)
from jobs.record import now
from jobs.violations import shown
from service.auth.seats import Seat
from service.comparisons.model import Comparison, ComparisonState, Pair, PairState, ViewingCopy
from service.comparisons.model import PairKind as Kind
from service.comparisons.rating.raters import Rater
from service.comparisons.rating.sessions import expected_items, plan
from service.comparisons.rating.votes import (
    Counters,
    Given,
    Outcome,
    Provenance,
    Response,
    VoteStore,
)
from service.comparisons.store import ComparisonStore
from service.lookups.cached import CachedValue

Side = Literal["left", "right"]
CHOICES: Final = ("left", "right", "tie")
PAIRS_CACHED_S: Final = 2.0
"""How long the pairs of a comparison are cached; one that gets ready is shown this much later."""
MAX_CACHED: Final = 64
TRIES: Final = 5
"""How often the next item is drawn again because another device of the rater was faster."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A comparison and its pairs as they were a moment ago.

    Attributes:
        expected: how many items that count one rater is shown, once all pairs are ready.
        training: how many training pairs come before.
        waiting: whether some pairs are still made.
    """

    comparison: Comparison
    pairs: Mapping[str, Pair]
    expected: int
    training: int
    waiting: bool

    def is_ready(self, pair_id: str) -> bool:
        """Return whether a pair can be shown."""
        return self.pairs[pair_id].state is PairState.READY


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a rater is.

    Attributes:
        done: pairs that count and were answered, by votes or skips.
        items: how many there will be in all.
        training_left: training pairs before them.
        since_break: how many since a break was suggested.
        break_due: whether a break is suggested now.
        waiting: whether videos are still made, so that more pairs may come.
        undo: whether the last answer can be taken back.
    """

    done: int
    items: int
    training_left: int
    skipped: int
    since_break: int
    break_due: bool
    waiting: bool
    undo: bool


@dataclass(frozen=True, slots=True)
class Shown:
    """The pair that a rater has to judge; `number` counts training and other pairs apart."""

    item: str
    number: int
    is_training: bool
    prompt: str
    left: ViewingCopy
    right: ViewingCopy
    undo: bool


class RatingDesk:
    """Serves the raters of all comparisons. Safe to share between threads.

    Methods raise ComparisonConflict while the comparison is not running, and ComparisonNotFound
    once it is deleted.
    """

    def __init__(self, redis: Redis, pairs_cached_s: float = PAIRS_CACHED_S) -> None:
        self._comparisons = ComparisonStore(redis)
        self._votes = VoteStore(redis)
        self._cached_s = pairs_cached_s
        self._cached: OrderedDict[str, CachedValue[Snapshot]] = OrderedDict()
        self._lock = Lock()

    def overview(self, seat: Seat) -> tuple[Comparison, Progress]:
        """Return the comparison, with its present state, and how far the rater is."""
        state, counters = self._votes.state_and_counters(seat.comparison_id, seat.rater_id)
        snapshot = self._snapshot(seat.comparison_id)
        comparison = snapshot.comparison.model_copy(update={"state": _present(state)})
        return comparison, _progress(snapshot, counters)

    def refuse_missing(self, comparison_id: str) -> None:
        """Raise ComparisonNotFound if there is no such comparison."""
        self._comparisons.get(comparison_id)

    def progress_of(self, comparison_id: str, raters: Sequence[Rater]) -> list[Progress]:
        """Return how far each of these raters is."""
        snapshot = self._snapshot(comparison_id)
        return [
            _progress(snapshot, self._votes.state_and_counters(comparison_id, rater.id)[1])
            for rater in raters
        ]

    def next(self, seat: Seat) -> Shown | None:
        """Return the pair to judge: the one that was shown last, until it is answered.

        None if all that can be shown was answered.
        """
        for _ in range(TRIES):
            history = self._votes.history(seat.comparison_id, seat.rater_id)
            _refuse_unless_running(history.state)
            snapshot = self._snapshot(seat.comparison_id)
            for given in history.given:
                if given.id not in history.answered and snapshot.is_ready(given.item.pair_id):
                    return _shown(snapshot, history.given, given, history.counters)
            before = [given.item for given in history.given]
            pairs = tuple(snapshot.pairs.values())
            planned = plan(snapshot.comparison, seat.rater_id, pairs, before).items[len(before) :]
            if not planned:
                return None
            place = len(before)
            name = snapshot.comparison.opaque("item", seat.rater_id, place)
            given = Given(name, place, planned[0])
            state, was_given = self._votes.give(seat.comparison_id, seat.rater_id, given)
            _refuse_unless_running(state)
            if was_given:
                return _shown(snapshot, (*history.given, given), given, history.counters)
        raise StoreUnavailable("Other devices of this rater ask for pairs all the time; try again.")

    def vote(
        self, seat: Seat, item_id: str, choices: Mapping[str, object], provenance: Provenance
    ) -> Progress:
        """Store a vote.

        Raises:
            InvalidSpec: a criterion is missing or unknown, or its answer is none of CHOICES.
            ItemNotFound, Forbidden: the item is unknown, or another rater's.
            AlreadyVoted: the item was answered before.
            PairLeftOut: a video of the pair is missing.
        """
        criteria = self._snapshot(seat.comparison_id).comparison.criteria
        checked = _checked_choices(choices, criteria)
        return self._store(
            seat, item_id, Response(at=now(), choices=checked, provenance=provenance)
        )

    def skip(self, seat: Seat, item_id: str, reason: str | None) -> Progress:
        """Store that a rater cannot judge a pair; raises what `vote` does."""
        return self._store(seat, item_id, Response(at=now(), skipped=True, reason=reason))

    def undo(self, seat: Seat) -> Progress:
        """Take back the last vote or skip, whose pair is then the next one again.

        Raises:
            NothingToUndo: there is none, or it was taken back already.
        """
        state, item, counters = self._votes.undo(seat.comparison_id, seat.rater_id)
        _refuse_unless_running(state)
        if item is None:
            raise NothingToUndo(
                "There is no last answer to take back: only the latest one can be, and once."
            )
        return _progress(self._snapshot(seat.comparison_id), counters)

    def file(self, seat: Seat, item_id: str, side: Side) -> tuple[ViewingCopy, str]:
        """Return the copy that stands on a side, and an opaque tag for it.

        Raises:
            ItemNotFound, Forbidden: the item is unknown, or another rater's.
            PairLeftOut: a video of the pair is missing.
        """
        given = self._own(seat, item_id)
        snapshot = self._snapshot(seat.comparison_id)
        pair = snapshot.pairs[given.item.pair_id]
        copy = pair.half(given.item.arm(side)).copy_
        if copy is None:
            raise _left_out()
        return copy, snapshot.comparison.opaque("file", item_id, side)

    def _own(self, seat: Seat, item_id: str) -> Given:
        found = self._votes.find(seat.comparison_id, item_id)
        if found is None:
            raise _unknown(item_id)
        rater_id, given = found
        if rater_id != seat.rater_id:
            raise _foreign()
        return given

    def _store(self, seat: Seat, item_id: str, response: Response) -> Progress:
        state, outcome, counters = self._votes.answer(
            seat.comparison_id, seat.rater_id, item_id, response
        )
        if outcome is Outcome.UNKNOWN:
            raise _unknown(item_id)
        if outcome is Outcome.FOREIGN:
            raise _foreign()
        if outcome is Outcome.LEFT_OUT:
            raise _left_out()
        _refuse_unless_running(state)
        if outcome is Outcome.ANSWERED:
            raise AlreadyVoted(
                "This pair was answered before, perhaps on another device; the first answer "
                "counts. Take it back with POST /rating/undo, or go on with GET /rating/next."
            )
        return _progress(self._snapshot(seat.comparison_id), counters)

    def _snapshot(self, comparison_id: str) -> Snapshot:
        with self._lock:
            cached = self._cached.get(comparison_id)
            if cached is None:
                cached = CachedValue(lambda: self._read(comparison_id), self._cached_s)
                self._cached[comparison_id] = cached
                if len(self._cached) > MAX_CACHED:
                    self._cached.popitem(last=False)
        return cached.get()

    def _read(self, comparison_id: str) -> Snapshot:
        comparison = self._comparisons.get(comparison_id)
        pairs = self._comparisons.pairs(comparison_id)
        possible = [pair for pair in pairs if pair.state is not PairState.FAILED]
        return Snapshot(
            comparison,
            {pair.id: pair for pair in pairs},
            expected=expected_items(comparison, pairs),
            training=sum(pair.kind is Kind.TRAINING for pair in possible),
            waiting=any(pair.state is not PairState.READY for pair in possible),
        )


def _progress(snapshot: Snapshot, counters: Counters) -> Progress:
    every = snapshot.comparison.rating.break_every
    items = max(snapshot.expected, counters.done)
    since_break = counters.done % every if every else counters.done
    in_training = counters.done == 0
    return Progress(
        done=counters.done,
        items=items,
        training_left=max(0, snapshot.training - counters.training) if in_training else 0,
        skipped=counters.skipped,
        since_break=since_break,
        break_due=0 < counters.done < items and every > 0 and since_break == 0,
        waiting=snapshot.waiting,
        undo=counters.last is not None,
    )


def _shown(
    snapshot: Snapshot, all_given: tuple[Given, ...], given: Given, counters: Counters
) -> Shown:
    pair = snapshot.pairs[given.item.pair_id]
    left, right = (pair.half(given.item.arm(side)).copy_ for side in ("left", "right"))
    assert left is not None, "a pair that is ready has copies"
    assert right is not None, "a pair that is ready has copies"
    assert pair.prompt_id is not None, "a pair that is ready has a prompt"
    is_training = given.item.is_training
    return Shown(
        item=given.id,
        number=sum(each.item.is_training is is_training for each in all_given[: given.place + 1]),
        is_training=is_training,
        prompt=snapshot.comparison.prompt(pair.prompt_id).prompt,
        left=left,
        right=right,
        undo=counters.last is not None,
    )


def _checked_choices(choices: Mapping[str, object], criteria: tuple[str, ...]) -> dict[str, object]:
    """Return a vote's choices. Raises InvalidSpec with every criterion that is wrong."""
    bound = f"one of {', '.join(CHOICES)}"
    names = ", ".join(criteria)
    violations = [
        Violation(
            f"answers.{shown(name)}",
            None,
            f"one of {names}",
            f"{shown(name)} is no criterion of this comparison; they are {names}.",
        )
        for name in choices
        if name not in criteria
    ][:20]
    for name in criteria:
        choice = choices.get(name)
        if choice not in CHOICES:
            said = (
                f"is {shown(choice)}, which is not" if name in choices else "is missing; it takes"
            )
            violations.append(
                Violation(f"answers.{name}", shown(choice), bound, f"{name} {said} {bound}.")
            )
    if violations:
        raise InvalidSpec(violations)
    return {name: choices[name] for name in criteria}


def _present(state: ComparisonState | None) -> ComparisonState:
    if state is None:
        raise ComparisonNotFound("This comparison was deleted; there is nothing left to judge.")
    return state


def _refuse_unless_running(state: ComparisonState | None) -> None:
    """Raise the error that tells a rater why nothing can be judged now."""
    state = _present(state)
    if state is ComparisonState.PAUSED:
        raise ComparisonConflict(
            "The comparison is paused; what you have answered is kept. Keep the page open, it goes "
            "on when the comparison does.",
            state="paused",
        )
    if state is not ComparisonState.RUNNING:
        raise ComparisonConflict(
            "The comparison has ended, and takes no more answers. Thank you for yours.",
            state="closed",
        )


def _unknown(item_id: str) -> ItemNotFound:
    return ItemNotFound(
        f"No pair was shown under {shown(item_id)}; GET /rating/next has the pair to judge."
    )


def _foreign() -> Forbidden:
    return Forbidden("This pair was shown to another rater; nobody votes for others.")


def _left_out() -> PairLeftOut:
    return PairLeftOut(
        "One of the two videos of this pair is missing, so it is left out; go on with "
        "GET /rating/next."
    )
