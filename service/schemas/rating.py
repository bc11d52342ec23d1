"""Define the JSON of raters: what they are shown and what they send.

Nothing here names a mode, a job, a seed or a file.
"""

from collections.abc import Sequence
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from service.comparisons.model import Comparison, ComparisonState, ViewingCopy
from service.comparisons.rating.desk import CHOICES, Progress, Shown
from service.comparisons.rating.raters import MAX_NAME_CHARS, Rater
from service.comparisons.rating.votes import MAX_REASON_CHARS, Provenance
from service.comparisons.statistics.criteria import BY_ID

RatingState = Literal["open", "paused", "closed"]
_STATES: dict[ComparisonState, RatingState] = {
    ComparisonState.RUNNING: "open",
    ComparisonState.PAUSED: "paused",
}


class RaterBody(BaseModel):
    """A rater to add to a comparison."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(description=f"Of 1 to {MAX_NAME_CHARS} characters; for operators.")
    key: str | None = Field(
        default=None,
        description="The owner of an API key of role rater, which then opens the seat, too.",
    )


class RaterLinkView(BaseModel):
    """A rater with the link, which is shown this once."""

    id: str
    name: str
    url: str = Field(description="The page to open; what follows the # is the secret.")

    @classmethod
    def of(cls, rater: Rater, base_url: str, token: str) -> Self:
        """Build the view of a rater whose link was just made."""
        return cls(id=rater.id, name=rater.name, url=f"{base_url}/rate#{token}")


class RaterView(BaseModel):
    """A rater of a comparison."""

    id: str
    name: str
    key: str | None = Field(description="The owner of the key that opens the seat, if any.")
    removed: bool = Field(description="Whether the seat was withdrawn; the votes stay.")
    votes: int = Field(description="Votes that count, on pairs that are not for training.")
    skipped: int
    items: int = Field(description="How many pairs the rater is to judge.")
    done: bool = Field(description="Whether all of them were answered.")


class RaterListView(BaseModel):
    """The raters of a comparison, oldest first."""

    raters: list[RaterView]

    @classmethod
    def of(cls, raters: Sequence[Rater], progress: Sequence[Progress]) -> Self:
        """Build the view of raters with how far each is."""
        return cls(
            raters=[
                RaterView(
                    id=rater.id,
                    name=rater.name,
                    key=rater.key_owner,
                    removed=rater.removed_at is not None,
                    votes=each.done - each.skipped,
                    skipped=each.skipped,
                    items=each.items,
                    done=each.done >= each.items and not each.waiting,
                )
                for rater, each in zip(raters, progress, strict=True)
            ]
        )


class JoinBody(BaseModel):
    """What opens a seat: the token of a link, or, for callers with a key, a comparison's id."""

    model_config = ConfigDict(extra="forbid")

    token: str | None = Field(default=None, description="What the link has after the #.")
    comparison: str | None = Field(
        default=None,
        description="For a key of role rater with seats in several comparisons: where to go.",
    )


class VoteBody(BaseModel):
    """A vote: an answer for every criterion of the comparison."""

    model_config = ConfigDict(extra="forbid")

    answers: dict[str, object] = Field(
        description=f"By criterion: one of {', '.join(CHOICES)}.",
        examples=[{"overall": "left"}],
    )
    provenance: Provenance = Provenance()


class SkipBody(BaseModel):
    """A skip, with a reason if the rater wants to give one."""

    model_config = ConfigDict(extra="forbid")

    reason: str | None = Field(default=None, max_length=MAX_REASON_CHARS)


class CriterionView(BaseModel):
    """A question to the rater."""

    id: str
    name: str
    definition: str


class RatedComparisonView(BaseModel):
    """What a rater may know of the comparison."""

    title: str
    instructions: str | None = Field(description="Null for the usual ones.")
    criteria: list[CriterionView]
    ties: bool = Field(description="Whether tie is an answer.")


class ProgressView(BaseModel):
    """How far the rater is."""

    done: int = Field(description="Pairs that count and were answered, by votes or skips.")
    items: int = Field(description="How many there will be in all.")
    training_left: int = Field(description="Training pairs to come before.")
    skipped: int
    since_break: int = Field(description="Answers since a break was suggested.")
    break_due: bool = Field(description="Whether a break is suggested now.")
    waiting: bool = Field(description="Whether videos are still made, so that more may come.")
    undo: bool = Field(description="Whether the last answer can be taken back.")

    @classmethod
    def of(cls, progress: Progress) -> Self:
        """Build the view of a rater's progress."""
        return cls(**{name: getattr(progress, name) for name in cls.model_fields})


class RatingView(BaseModel):
    """The comparison that the caller rates."""

    comparison: RatedComparisonView
    progress: ProgressView
    state: RatingState

    @classmethod
    def of(cls, comparison: Comparison, progress: Progress) -> Self:
        """Build the view of a comparison for one rater."""
        criteria = [BY_ID[name] for name in comparison.criteria]
        return cls(
            comparison=RatedComparisonView(
                title=comparison.title,
                instructions=comparison.rating.instructions,
                criteria=[
                    CriterionView(id=each.id, name=each.name, definition=each.definition)
                    for each in criteria
                ],
                ties=True,
            ),
            progress=ProgressView.of(progress),
            state=_STATES.get(comparison.state, "closed"),
        )


class SideView(BaseModel):
    """One of the two videos."""

    url: str = Field(description="Absolute path; needs the caller's session or key.")
    width: int
    height: int
    fps: int
    num_frames: int

    @classmethod
    def of(cls, url: str, copy: ViewingCopy) -> Self:
        """Build the view of one video."""
        shape = copy.model_dump(include={"width", "height", "fps", "num_frames"})
        return cls(url=url, **shape)


class ItemView(BaseModel):
    """The pair to judge."""

    item: str = Field(description="Opaque; votes name it.")
    number: int = Field(description="From 1; training pairs are counted apart.")
    kind: Literal["training", "rated"] = Field(description="Answers to training do not count.")
    prompt: str
    left: SideView
    right: SideView
    undo: bool = Field(description="Whether the last answer can be taken back.")

    @classmethod
    def of(cls, shown: Shown, public_path: str) -> Self:
        """Build the view of a pair; `public_path` goes before the addresses of its videos."""
        address = f"{public_path}/rating/items/{shown.item}"
        return cls(
            item=shown.item,
            number=shown.number,
            kind="training" if shown.is_training else "rated",
            prompt=shown.prompt,
            left=SideView.of(f"{address}/left.mp4", shown.left),
            right=SideView.of(f"{address}/right.mp4", shown.right),
            undo=shown.undo,
        )
