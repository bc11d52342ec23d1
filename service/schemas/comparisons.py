"""Define the JSON of comparisons that operators see.

Raters see nothing of it, because it names the modes.
"""

from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from typing import Final, Self

from pydantic import BaseModel, Field

from jobs.errors import InvalidSpec
from jobs.record import Failure
from jobs.violations import outside, shown
from service.comparisons.model import (
    Arm,
    Comparison,
    ComparisonState,
    Contender,
    Half,
    HalfState,
    Pair,
    PairKind,
    PairState,
    PixelMeasures,
    RatingPlan,
    SharedSettings,
)
from service.comparisons.statistics.votes import Ties
from service.schemas.rating import RaterView

PAIRS_PAGE: Final = 50
MAX_PAIRS_PAGE: Final = 200
_IN_PROGRESS: Final = (PairState.RUNNING, PairState.MADE)


class HalfView(BaseModel):
    """One half of a pair."""

    state: HalfState = Field(description="Of its job; waiting before it has one.")
    job_id: str | None = Field(description="`GET /jobs/{job_id}` has everything about it.")
    attempts: int = Field(description="How many jobs were asked for: one, and one a retry.")
    failure: Failure | None = Field(description="Why it has no video.")

    @classmethod
    def of(cls, half: Half) -> Self:
        """Build the view of a half."""
        return cls(
            state=half.state, job_id=half.job_id, attempts=half.attempt, failure=half.failure
        )


class PairView(BaseModel):
    """Two videos that are held against each other."""

    id: str
    number: int = Field(description="Its place in the comparison, from 1.")
    kind: PairKind = Field(
        description="Only test pairs count. The others are made from test pairs: gold ones have a "
        "damaged half, identical ones the same video twice."
    )
    state: PairState = Field(
        description="ready: raters may see it. failed: it is left out, until it is retried. made: "
        "its videos are there, and their copies are being prepared."
    )
    prompt: str | None = Field(description="Null for a pair whose test pair is not chosen yet.")
    negative_prompt: str | None
    line: int | None = Field(description="Of the prompt in the file it came from.")
    seed: int | None = Field(description="Of both videos.")
    source: str | None = Field(description="The test pair that it is made from.")
    reference: HalfView
    candidate: HalfView
    measures: PixelMeasures | None = Field(description="Of the two videos, if they are measured.")
    failure: Failure | None = Field(description="Why the copies for raters cannot be made.")

    @classmethod
    def of(cls, comparison: Comparison, pair: Pair) -> Self:
        """Build the view of a pair."""
        prompt = None if pair.prompt_id is None else comparison.prompt(pair.prompt_id)
        return cls(
            id=pair.id,
            number=pair.number,
            kind=pair.kind,
            state=pair.state,
            prompt=None if prompt is None else prompt.prompt,
            negative_prompt=None if prompt is None else prompt.negative_prompt,
            line=None if prompt is None else prompt.line,
            seed=pair.seed,
            source=pair.source,
            reference=HalfView.of(pair.half(Arm.REFERENCE)),
            candidate=HalfView.of(pair.half(Arm.CANDIDATE)),
            measures=pair.measures,
            failure=pair.failure,
        )


class PairPageView(BaseModel):
    """Pairs of a comparison, by their numbers."""

    pairs: list[PairView]
    next_cursor: str | None = Field(description="Ask with it for the next page; null on the last.")

    @classmethod
    def of(
        cls,
        comparison: Comparison,
        pairs: Sequence[Pair],
        limit: int = PAIRS_PAGE,
        cursor: str | None = None,
    ) -> Self:
        """Build a page of the pairs after a cursor.

        Raises:
            InvalidSpec: the limit is out of bounds, or the cursor is not one of a page.
        """
        if not 1 <= limit <= MAX_PAIRS_PAGE:
            bound = f"a whole number from 1 to {MAX_PAIRS_PAGE}"
            raise InvalidSpec([outside("limit", limit, bound)])
        start = 0 if cursor is None else _place(cursor)
        shown_pairs = pairs[start : start + limit]
        end = start + len(shown_pairs)
        return cls(
            pairs=[PairView.of(comparison, pair) for pair in shown_pairs],
            next_cursor=f"p{end}" if end < len(pairs) else None,
        )


class PairCounts(BaseModel):
    """How many test pairs there are, and how many are in which state."""

    pairs: int
    ready: int = Field(description="Both videos are there, and raters may see them.")
    failed: int = Field(description="A half failed; the pair is left out, until it is retried.")
    waiting: int = Field(description="Not begun, or half of it is still to be submitted.")
    running: int = Field(description="A job is queued or running, or copies are being prepared.")

    @classmethod
    def of(cls, pairs: Sequence[Pair]) -> Self:
        """Count test pairs."""
        states = Counter(pair.state for pair in pairs if pair.kind is PairKind.TEST)
        return cls(
            pairs=states.total(),
            ready=states[PairState.READY],
            failed=states[PairState.FAILED],
            waiting=states[PairState.WAITING],
            running=sum(states[state] for state in _IN_PROGRESS),
        )


class ComparisonView(BaseModel):
    """A comparison: what is fixed since it was created, and how far it is."""

    id: str
    title: str
    owner: str = Field(description="The name of the key that created it, which has its jobs.")
    created_at: datetime
    state: ComparisonState = Field(
        description="running: videos are made and votes are taken. paused: neither. closed: the "
        "result stands. cancelled: given up. The last two are final."
    )
    problem: str | None = Field(description="Why nothing goes on at the moment, if so.")
    reference: Contender
    candidate: Contender
    settings: SharedSettings
    prompts: int = Field(description="How many there are.")
    criteria: list[str]
    margin: float
    alpha: float
    power: float
    ties: Ties
    rating: RatingPlan
    pixel_measures: bool
    counts: PairCounts
    raters: list[RaterView] | None = Field(
        description="Oldest first; null in lists and in answers to changes of the state."
    )

    @classmethod
    def of(
        cls,
        comparison: Comparison,
        pairs: Sequence[Pair],
        raters: list[RaterView] | None = None,
    ) -> Self:
        """Build the view of a comparison with all its pairs."""
        derived = {
            "prompts": len(comparison.prompts),
            "counts": PairCounts.of(pairs),
            "raters": raters,
        }
        names = [name for name in ComparisonView.model_fields if name not in derived]
        return cls(**derived, **{name: getattr(comparison, name) for name in names})


class ComparisonListView(BaseModel):
    """Comparisons, newest first."""

    comparisons: list[ComparisonView]
    next_cursor: str | None = Field(description="Ask with it for the next page; null on the last.")


def _place(cursor: str) -> int:
    number = cursor[1:]
    if not (cursor.startswith("p") and number.isascii() and number.isdigit() and len(number) < 6):
        raise InvalidSpec.of(
            "cursor",
            shown(cursor),
            "the next_cursor of an earlier page",
            "cursor is not one this service has given; take next_cursor of the page before, or "
            "leave it out.",
        )
    return int(number)
