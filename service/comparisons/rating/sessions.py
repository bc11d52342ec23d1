"""Plan what a rater is shown: which pairs, in which order, and what stands on which side.

A plan follows from the comparison's secret, the rater, the state of the pairs and what the rater
was given before. What was given stays; pairs that get ready later come after it. Nothing of the
order or the sides follows from the modes.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from service.comparisons.model import Arm, Comparison, Pair, PairKind, PairState

REPEAT_DISTANCE: Final = 6
"""A pair comes back after at least so many others, if there are as many."""


@dataclass(frozen=True, slots=True)
class Item:
    """One showing of a pair to one rater."""

    pair_id: str
    kind: PairKind
    candidate_left: bool
    is_repeat: bool = False

    @property
    def is_training(self) -> bool:
        """Whether the answer does not count, and the rater is told so."""
        return self.kind is PairKind.TRAINING

    def arm(self, side: str) -> Arm:
        """Return what stands on a side, "left" or "right"."""
        return Arm.CANDIDATE if (side == "left") is self.candidate_left else Arm.REFERENCE


@dataclass(frozen=True, slots=True)
class Plan:
    """What a rater is shown.

    Attributes:
        items: what was given, and then what is to come.
        expected: the number of items that count once all pairs are ready.
        is_waiting: whether more is to come that cannot be shown yet.
    """

    items: tuple[Item, ...]
    expected: int
    is_waiting: bool


def plan(
    comparison: Comparison, rater_id: str, pairs: Sequence[Pair], given: Sequence[Item] = ()
) -> Plan:
    """Return the plan of one rater.

    - Training pairs come first, and wait for each other.
    - Test pairs follow in an order of the rater's own, up to `per_rater`.
    - Gold and identical pairs are spread evenly among them at random.
    - A share of the test pairs comes a second time, with the sides swapped, at a distance.
    - In every stretch from the start, the candidate of first showings is as often on the left as on
      the right, up to one.
    """
    drawing = _Drawing(comparison, rater_id, pairs, given)
    rated = [item for item in given if not item.is_training]
    training = [] if rated else drawing.training()
    if training is None:
        return Plan(tuple(given), drawing.expected, is_waiting=True)
    seen = {(item.pair_id, item.is_repeat) for item in given}
    to_train = [item for item in training if (item.pair_id, False) not in seen]
    left = [item for item in drawing.rated() if (item.pair_id, item.is_repeat) not in seen]
    to_rate = _spaced(rated, left)
    # A pair may have failed after it was given; it does not come again.
    rest = [item for item in (*to_train, *to_rate) if item.pair_id in drawing.ready]
    return Plan((*given, *rest), drawing.expected, is_waiting=not drawing.is_complete)


def expected_items(comparison: Comparison, pairs: Sequence[Pair]) -> int:
    """Return how many items that count one rater is shown, once all pairs are ready."""
    return _Drawing(comparison, "", pairs, ()).expected


class _Drawing:
    """Draws the items of one rater; every draw is the same each time."""

    def __init__(
        self,
        comparison: Comparison,
        rater_id: str,
        pairs: Sequence[Pair],
        given: Sequence[Item],
    ) -> None:
        self._comparison = comparison
        self._rater_id = rater_id
        self._given = given
        self._possible: dict[PairKind, list[Pair]] = {kind: [] for kind in PairKind}
        self.ready: set[str] = set()
        for pair in pairs:
            state = pair.state  # worked out once: there may be a thousand pairs
            if state is PairState.READY:
                self.ready.add(pair.id)
            if state is not PairState.FAILED:
                self._possible[pair.kind].append(pair)
        possible = self._possible[PairKind.TEST]
        wanted = min(comparison.rating.per_rater or len(possible), len(possible))
        first = [i.pair_id for i in given if i.kind is PairKind.TEST and not i.is_repeat]
        # Pairs that failed after they were given have a place in the order, but do not count.
        lost = len(set(first) - {pair.id for pair in possible})
        self._planned = wanted + lost
        self._tests = self._test_pairs(first)
        self._repeats = round(comparison.rating.repeat_share * wanted)
        checks = (PairKind.GOLD, PairKind.IDENTICAL)
        self.expected = wanted + self._repeats + sum(len(self._possible[kind]) for kind in checks)
        self.is_complete = len(self._tests) == self._planned and all(
            pair.id in self.ready for kind in checks for pair in self._possible[kind]
        )

    def training(self) -> list[Item] | None:
        """Return the training items; None while some are still made."""
        pairs = self._possible[PairKind.TRAINING]
        if not all(pair.id in self.ready for pair in pairs):
            return None
        return [self._check(number, pair) for number, pair in enumerate(pairs)]

    def rated(self) -> list[Item]:
        """Return the items that count, in their order."""
        placed: list[tuple[float, int, Item]] = []
        for number, pair_id in enumerate(self._tests):
            placed.append((number + 0.5, 0, self._test(number, pair_id)))
        for number, position in self._repeated().items():
            first = self._test(number, self._tests[number])
            again = Item(first.pair_id, first.kind, not first.candidate_left, is_repeat=True)
            placed.append((position, 1, again))
        for kind in (PairKind.GOLD, PairKind.IDENTICAL):
            for number, pair in enumerate(self._possible[kind]):
                if pair.id in self.ready:
                    position = self._planned * self._draw("position", pair.id)
                    placed.append((position, 2, self._check(number, pair)))
        # What lies beyond the tests that are ready waits for them, or the checks would come first.
        reached = float("inf") if len(self._tests) == self._planned else len(self._tests)
        placed.sort(key=lambda each: (each[0], each[1], each[2].pair_id))
        return [item for position, _, item in placed if position <= reached]

    def _test_pairs(self, given: list[str]) -> list[str]:
        """Return the ids of test pairs: those that were given, then the rater's own order."""
        known = set(given)
        possible = self._possible[PairKind.TEST]
        ready = [pair.id for pair in possible if pair.id in self.ready]
        ready.sort(key=lambda pair_id: self._draw("order", pair_id))
        order = [*given, *(pair_id for pair_id in ready if pair_id not in known)]
        return order[: self._planned]

    def _test(self, number: int, pair_id: str) -> Item:
        return Item(pair_id, PairKind.TEST, self._is_left("test", number))

    def _check(self, number: int, pair: Pair) -> Item:
        return Item(pair.id, pair.kind, self._is_left(pair.kind.value, number))

    def _is_left(self, kind: str, number: int) -> bool:
        """Draw the sides of two items at a time, so that they stay balanced."""
        return (self._draw("side", kind, number // 2) < 0.5) is (number % 2 == 0)

    def _repeated(self) -> dict[int, float]:
        """Return the positions of repeats by the numbers of their test pairs."""
        given = {item.pair_id for item in self._given if item.is_repeat}
        number_of = {pair_id: number for number, pair_id in enumerate(self._tests)}
        # Those that leave room for the distance first.
        last = self._planned - REPEAT_DISTANCE
        order = sorted(
            number_of,
            key=lambda name: (
                name not in given,
                number_of[name] >= last,
                self._draw("repeat", name),
            ),
        )
        found = {}
        for pair_id in order[: self._repeats]:
            number = number_of[pair_id]
            earliest = min(number + 1 + REPEAT_DISTANCE, self._planned)
            room = self._planned - earliest
            found[number] = earliest + room * self._draw("again", pair_id)
        return found

    def _draw(self, *parts: object) -> float:
        """Return a number from 0 to below 1 that only the comparison's secret explains."""
        return int(self._comparison.opaque("plan", self._rater_id, *parts)[:13], 16) / 16**13


def _spaced(rated: Iterable[Item], rest: list[Item]) -> list[Item]:
    """Move repeats that follow their pairs too closely behind the next others."""
    order = list(rated)
    first = {item.pair_id: at for at, item in enumerate(order) if not item.is_repeat}
    begin = len(order)
    while rest:
        chosen = next((item for item in rest if _may_follow(item, first, len(order))), rest[0])
        rest.remove(chosen)
        if not chosen.is_repeat:
            first[chosen.pair_id] = len(order)
        order.append(chosen)
    return order[begin:]


def _may_follow(item: Item, first: dict[str, int], at: int) -> bool:
    if not item.is_repeat:
        return True
    return item.pair_id in first and at - first[item.pair_id] > REPEAT_DISTANCE
