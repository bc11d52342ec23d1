"""Define a vote of a blind comparison, and how votes turn into scores.

A comparison holds a candidate mode against a reference mode, such as `w8a8` against `bf16`. Here a
vote is seen from the candidate: it wins, ties or loses. Storage and HTTP are elsewhere.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum


class Outcome(StrEnum):
    """What a vote says of the candidate."""

    WIN = "win"
    TIE = "tie"
    LOSS = "loss"


class Side(StrEnum):
    """Where a video stood on the screen."""

    LEFT = "left"
    RIGHT = "right"


class PairKind(StrEnum):
    """What a pair is for. Only votes on test pairs count; the others check the raters.

    In a gold pair one half is damaged on purpose; its candidate is the intact half. In an identical
    pair both halves are the same video, and either may be called the candidate.
    """

    TEST = "test"
    GOLD = "gold"
    IDENTICAL = "identical"


class Ties(StrEnum):
    """How ties count, as fixed when the comparison is created.

    HALF: as half a win; the share is that of all votes. LEFT_OUT: not at all; the share is that of
    the decisive votes. The margin refers to the same share.
    """

    HALF = "half"
    LEFT_OUT = "left_out"


@dataclass(frozen=True, slots=True)
class Vote:
    """One rater's vote on one pair for one criterion.

    Attributes:
        candidate_side: where the candidate stood when the vote was given.
        is_repeat: the rater had seen this pair before, with the sides the other way round.
    """

    prompt_id: str
    pair_id: str
    rater_id: str
    criterion: str
    outcome: Outcome
    candidate_side: Side
    is_repeat: bool = False
    kind: PairKind = PairKind.TEST

    @property
    def chosen_side(self) -> Side | None:
        """The side that the rater preferred; None for a tie."""
        if self.outcome is Outcome.TIE:
            return None
        if self.outcome is Outcome.WIN:
            return self.candidate_side
        return Side.RIGHT if self.candidate_side is Side.LEFT else Side.LEFT


@dataclass(frozen=True, slots=True)
class Score:
    """A vote as a number: 1 if the candidate won, 0 if it lost, 0.5 if a tie counts as half."""

    rater_id: str
    prompt_id: str
    value: float


SCORES = {Outcome.WIN: 1.0, Outcome.TIE: 0.5, Outcome.LOSS: 0.0}


def counted(votes: Iterable[Vote]) -> list[Vote]:
    """Return the votes that results are made from: first votes on test pairs."""
    return [vote for vote in votes if vote.kind is PairKind.TEST and not vote.is_repeat]


def scores(votes: Sequence[Vote], ties: Ties) -> list[Score]:
    """Return the scores of votes, with ties as half or left out."""
    return [
        Score(vote.rater_id, vote.prompt_id, SCORES[vote.outcome])
        for vote in votes
        if ties is Ties.HALF or vote.outcome is not Outcome.TIE
    ]
