"""Define a blind comparison of two modes: its settings, its prompts, and its pairs of videos.

Everything but the state is fixed when the comparison is created, before anybody has voted. What is
here is for operators: nothing of it may reach a rater as it is, because it names the modes.
"""

import hashlib
from enum import StrEnum
from typing import Final

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from jobs.record import Failure
from jobs.spec import MAX_SEED
from service.comparisons.statistics.criteria import BY_ID
from service.comparisons.statistics.votes import Ties

MAX_PROMPTS: Final = 500
MAX_PAIRS: Final = 1000
"""The most test pairs of a comparison: prompts times seeds."""


class ComparisonState(StrEnum):
    """The states of a comparison.

    RUNNING: videos are made, and raters may vote. PAUSED: no further job is submitted, and nobody
    votes. CLOSED: the result stands. CANCELLED: given up. The last two are final.
    """

    RUNNING = "running"
    PAUSED = "paused"
    CLOSED = "closed"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        """Whether no state follows this one."""
        return self in (ComparisonState.CLOSED, ComparisonState.CANCELLED)


class Arm(StrEnum):
    """The two halves of a pair."""

    REFERENCE = "reference"
    CANDIDATE = "candidate"


class PairKind(StrEnum):
    """What a pair is for. Only test pairs count; the values are those of `statistics.votes`.

    TEST: the videos of the two modes. GOLD: a video and the same one damaged; the intact half is
    the candidate. IDENTICAL: the same video twice. TRAINING: shown before the first vote that
    counts; a damaged half or the same video twice, so that no test pair is used up.
    """

    TEST = "test"
    GOLD = "gold"
    IDENTICAL = "identical"
    TRAINING = "training"


class HalfState(StrEnum):
    """The state of a half: that of its job when it was last looked at; WAITING before it has one.

    Halves of pairs that are not TEST have no job, and stay WAITING until their copies are made.
    """

    WAITING = "waiting"
    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def has_ended(self) -> bool:
        """Whether nothing more happens to the half, unless its failure is retried."""
        return self in (HalfState.SUCCEEDED, HalfState.FAILED, HalfState.CANCELLED)

    @property
    def is_open(self) -> bool:
        """Whether a job is waiting or running."""
        return self in (HalfState.QUEUED, HalfState.RUNNING)


class PairState(StrEnum):
    """The state of a pair.

    WAITING: nothing has begun, or it continues later. RUNNING: a job is queued or running. MADE:
    both videos are there, and their copies are still to be made. READY: it can be shown. FAILED: at
    least one half or the copies failed; it is left out until it is retried.
    """

    WAITING = "waiting"
    RUNNING = "running"
    MADE = "made"
    READY = "ready"
    FAILED = "failed"


class _Part(BaseModel):
    # Later versions may add fields. Values may be prompts, which must not be logged.
    model_config = ConfigDict(frozen=True, extra="ignore", hide_input_in_errors=True)


class Contender(_Part):
    """One of the two sides of a comparison: a mode of a model.

    Attributes:
        num_inference_steps, guidance_scale: its own, where they are not those of the settings.
    """

    mode: str
    model: str
    num_inference_steps: int | None = None
    guidance_scale: float | None = None


class SharedSettings(_Part):
    """The settings of the videos of a comparison, complete: defaults are filled in at creation.

    Steps and guidance are the reference's; the candidate may have its own.
    """

    size: str
    num_frames: int
    num_inference_steps: int
    guidance_scale: float


class Prompt(_Part):
    """A prompt and its seeds; `id` names it in votes and results, and is its number from 1.

    Attributes:
        line: where it stood in the file it came from; None if it was not in a file.
        negative_prompt: its own, or that of the comparison.
    """

    id: str
    prompt: str
    negative_prompt: str
    seeds: tuple[int, ...] = Field(min_length=1)
    line: int | None = None


class RatingPlan(_Part):
    """What a rater is shown besides the test pairs.

    Attributes:
        training: pairs before the first vote that counts.
        repeat_share: this share of a rater's test pairs is shown a second time, sides swapped.
        identical: pairs of the same video twice.
        gold: pairs with one half that is damaged on purpose.
        per_rater: how many test pairs one rater gets; None for all.
        break_every: a break is suggested after so many votes; 0 for never.
        least_seen: a vote counts if the rater saw this share of the frames of both videos; 0 counts
            every vote.
        instructions: what raters read first, instead of the usual text.
    """

    training: int = Field(default=2, ge=0, le=10)
    repeat_share: float = Field(default=0.1, ge=0, le=0.5, allow_inf_nan=False)
    identical: int = Field(default=2, ge=0, le=20)
    gold: int = Field(default=2, ge=0, le=20)
    per_rater: int | None = Field(default=None, ge=1, le=MAX_PAIRS)
    break_every: int = Field(default=20, ge=0, le=1000)
    least_seen: float = Field(default=0.0, ge=0, le=1, allow_inf_nan=False)
    instructions: str | None = Field(default=None, max_length=4000)


class Comparison(_Part):
    """A comparison and its state.

    Attributes:
        owner: the name of the API key that created it; its jobs belong to this owner.
        margin: the loss of share that would be acceptable, for non-inferiority.
        alpha: the level of one-sided bounds.
        power: for the number of votes that are needed.
        pixel_measures: whether PSNR and SSIM of the pairs are measured.
        secret: 32 hex digits, from which opaque names and orders are derived; never shown.
        problem: why nothing goes on at the moment, in a sentence; None if nothing is wrong.
    """

    id: str
    title: str
    owner: str
    created_at: AwareDatetime
    reference: Contender
    candidate: Contender
    settings: SharedSettings
    prompts: tuple[Prompt, ...] = Field(min_length=1, max_length=MAX_PROMPTS)
    criteria: tuple[str, ...] = tuple(BY_ID)
    margin: float = 0.1
    alpha: float = 0.05
    power: float = 0.8
    ties: Ties = Ties.HALF
    rating: RatingPlan = RatingPlan()
    pixel_measures: bool = True
    secret: str
    state: ComparisonState = ComparisonState.RUNNING
    problem: str | None = None

    def contender(self, arm: Arm) -> Contender:
        """Return the mode and model of one half of every test pair."""
        return self.reference if arm is Arm.REFERENCE else self.candidate

    def prompt(self, prompt_id: str) -> Prompt:
        """Return the prompt of this id."""
        return self.prompts[int(prompt_id) - 1]

    def opaque(self, *parts: object) -> str:
        """Return 32 hex digits that follow from the parts, and that only the secret explains."""
        text = ":".join(map(str, (self.secret, *parts)))
        return hashlib.sha256(text.encode()).hexdigest()[:32]


class ViewingCopy(_Part):
    """The file that raters see of a half; both halves of a pair have equally many bytes."""

    key: str
    bytes: int
    width: int
    height: int
    fps: int
    num_frames: int


class Half(_Part):
    """One half of a pair.

    Attributes:
        job_id: its latest job; None before the first, and for pairs that are not TEST.
        attempt: how often a job was asked for; 1 is the first.
        asked_at: when the latest job was asked for; set before it is created, so that a process
            that ends in between is noticed.
        failure: why there is no video.
        copy_: what raters see; None until both halves are there.
    """

    state: HalfState = HalfState.WAITING
    job_id: str | None = None
    attempt: int = 0
    asked_at: AwareDatetime | None = None
    failure: Failure | None = None
    copy_: ViewingCopy | None = Field(default=None, alias="copy")

    model_config = ConfigDict(populate_by_name=True, serialize_by_alias=True)


class PixelMeasures(_Part):
    """How alike the two videos of a pair are, by ffmpeg's filters, over all frames and planes.

    Attributes:
        psnr_db: None for identical pixels, whose PSNR is infinite.
        ssim: 1 for identical pixels.
    """

    psnr_db: float | None = None
    ssim: float


class Pair(_Part):
    """Two videos that are held against each other.

    Attributes:
        id: 16 random hex digits.
        number: its place in the comparison, from 1; test pairs come first.
        seed: that of both videos.
        source: the test pair whose copies this one is made from; None for test pairs, and before
            one was chosen.
        failure: why the copies could not be made.
    """

    id: str
    number: int
    kind: PairKind = PairKind.TEST
    prompt_id: str | None = None
    seed: int | None = Field(default=None, ge=0, le=MAX_SEED)
    source: str | None = None
    reference: Half = Half()
    candidate: Half = Half()
    measures: PixelMeasures | None = None
    failure: Failure | None = None

    def half(self, arm: Arm) -> Half:
        """Return one half."""
        return self.reference if arm is Arm.REFERENCE else self.candidate

    def with_half(self, arm: Arm, half: Half) -> "Pair":
        """Return the pair with another half."""
        return self.model_copy(update={arm.value: half})

    @property
    def halves(self) -> tuple[Half, Half]:
        """The reference's half and the candidate's."""
        return self.reference, self.candidate

    @property
    def state(self) -> PairState:
        """The state of the pair, from those of its halves."""
        states = [half.state for half in self.halves]
        if any(state.is_open for state in states):
            return PairState.RUNNING
        if self.failure is not None or any(
            state in (HalfState.FAILED, HalfState.CANCELLED) for state in states
        ):
            return PairState.FAILED
        if all(half.copy_ is not None for half in self.halves):
            return PairState.READY
        if all(state is HalfState.SUCCEEDED for state in states):
            return PairState.MADE
        return PairState.WAITING
