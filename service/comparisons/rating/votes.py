"""Store what raters are given and what they answer, in Redis.

For each rater there is the list of items that were given, in order, a hash of item ids to answers,
and counters; for each comparison a hash of item ids that says what an item is, and whose. All are
deleted with the comparison. Every change is one script in `lua/`, which also looks at the
comparison's state: so of two votes on one item exactly one is stored, and none after the end.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from importlib.resources import files
from typing import Annotated, Any, Final, Literal, cast

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field
from redis import Redis

from jobs import redis_keys
from service.comparisons.model import ComparisonState, PairKind
from service.comparisons.rating.sessions import Item
from service.comparisons.store import readable

Choice = Literal["left", "right", "tie"]
Count = Annotated[int, Field(ge=0, le=1_000_000)]
Pixels = Annotated[int, Field(ge=0, le=100_000)]
MAX_REASON_CHARS: Final = 500
MAX_FURTHER: Final = 16
FurtherName = Annotated[str, Field(pattern="^[a-z][a-z0-9_]{0,39}$")]
FurtherValue = bool | int | float | Annotated[str, Field(max_length=200)] | None


class Provenance(BaseModel):
    """How a vote came about, as the rater's player tells it; nothing of it is known for sure.

    Attributes:
        seconds_watched: from when the pair was shown until the vote.
        frames_seen: how many different frames of the left and the right video were shown.
        replays: how often the videos began again.
        viewport: width and height of the page, in CSS pixels.
        dropped_frames: how many frames the browser left out while it played.
        speed: the slowest speed that was used; 1 is normal.
        further: whatever else a player notes, up to 16 short values.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    seconds_watched: float | None = Field(default=None, ge=0, le=7 * 86_400)
    frames_seen: tuple[Count, Count] | None = None
    replays: Count | None = None
    viewport: tuple[Pixels, Pixels] | None = None
    dropped_frames: Count | None = None
    speed: float | None = Field(default=None, gt=0, le=16)
    further: dict[FurtherName, FurtherValue] = Field(default_factory=dict, max_length=MAX_FURTHER)


class Response(BaseModel):
    """What a rater says of a pair: a vote on every criterion, or a skip.

    Attributes:
        choices: by criterion; empty for a skip.
        reason: why it was skipped, if the rater said so.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    at: AwareDatetime
    skipped: bool = False
    choices: dict[str, Choice] = Field(default_factory=dict)
    reason: str | None = None
    provenance: Provenance = Provenance()


class Answer(Response):
    """A response with the item that it is to, as it is stored.

    Attributes:
        number: the item's place among all that the rater was given, from 1.
    """

    item: str
    number: int
    pair_id: str
    kind: PairKind
    candidate_left: bool
    is_repeat: bool


class Outcome(StrEnum):
    """What becomes of a response; the values are those of `lua/answer.lua`.

    STORED: now, or by an earlier try of the same call. UNKNOWN: there is no such item. FOREIGN: it
    was given to another rater. LEFT_OUT: its pair is not ready any more. STOPPED: the comparison is
    not running. ANSWERED: there is another answer to it.
    """

    STORED = "stored"
    UNKNOWN = "unknown"
    FOREIGN = "foreign"
    LEFT_OUT = "left_out"
    STOPPED = "stopped"
    ANSWERED = "answered"


@dataclass(frozen=True, slots=True)
class Given:
    """An item that a rater was given, with its opaque id and its place, from 0."""

    id: str
    place: int
    item: Item


@dataclass(frozen=True, slots=True)
class Counters:
    """What a rater has answered.

    Attributes:
        training: training pairs.
        done: pairs that count, votes and skips.
        skipped: those of them that were skipped.
        undone: answers that were taken back.
        last: the item whose answer can be taken back; None if there is none.
    """

    training: int = 0
    done: int = 0
    skipped: int = 0
    undone: int = 0
    last: str | None = None


@dataclass(frozen=True, slots=True)
class History:
    """Everything of one rater that the next item depends on.

    Attributes:
        state: that of the comparison; None if it was deleted.
        answered: the ids of the items that were answered.
    """

    state: ComparisonState | None
    given: tuple[Given, ...]
    answered: frozenset[str]
    counters: Counters


class VoteStore:
    """All access to items and answers. Safe to share between threads; Redis errors are raised."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._give = _script(redis, "give")
        self._answer = _script(redis, "answer")
        self._undo = _script(redis, "undo")

    def history(self, comparison_id: str, rater_id: str) -> History:
        """Read what a rater was given and has answered, at one moment."""
        with self._redis.pipeline() as pipe:
            pipe.hget(redis_keys.comparison(comparison_id), "state")
            pipe.lrange(_given_key(comparison_id, rater_id), 0, -1)
            pipe.hkeys(_answers_key(comparison_id, rater_id))
            pipe.hgetall(_progress_key(comparison_id, rater_id))
            state, given, answered, counters = pipe.execute()
        return History(
            _state(state),
            tuple(_decode_given(place, text) for place, text in enumerate(given)),
            frozenset(name.decode() for name in answered),
            _counters(counters),
        )

    def state_and_counters(
        self, comparison_id: str, rater_id: str
    ) -> tuple[ComparisonState | None, Counters]:
        """Read the state of a comparison, None if it was deleted, and the progress of a rater."""
        with self._redis.pipeline() as pipe:
            pipe.hget(redis_keys.comparison(comparison_id), "state")
            pipe.hgetall(_progress_key(comparison_id, rater_id))
            state, counters = pipe.execute()
        return _state(state), _counters(counters)

    def give(
        self, comparison_id: str, rater_id: str, given: Given
    ) -> tuple[ComparisonState | None, bool]:
        """Give an item; return the comparison's state, and False if another was given meanwhile."""
        keys = (
            redis_keys.comparison(comparison_id),
            _given_key(comparison_id, rater_id),
            _items_key(comparison_id),
        )
        text = _encode_given(given)
        # Beside the owner, so that a vote finds both in one call.
        owned = f"{rater_id} {given.place} {text}"
        state, done = self._give(keys, (given.place, given.id, text, owned))
        return _state(state), bool(done)

    def find(self, comparison_id: str, item_id: str) -> tuple[str, Given] | None:
        """Return to whom an item was given, and the item; None for an unknown id."""
        owned = cast("bytes | None", self._redis.hget(_items_key(comparison_id), item_id))
        if owned is None:
            return None
        rater_id, place, text = owned.split(b" ", 2)
        return rater_id.decode(), _decode_given(int(place), text)

    def answer(
        self, comparison_id: str, rater_id: str, item_id: str, response: Response
    ) -> tuple[ComparisonState | None, Outcome, Counters]:
        """Store a response; return the comparison's state, what became of it, and the progress.

        One call to Redis looks whose item it is, whether its pair is ready and the comparison runs.
        """
        keys = (
            *_answer_keys(comparison_id, rater_id),
            _items_key(comparison_id),
            redis_keys.comparison_part(comparison_id, "pairs"),
        )
        text = response.model_dump_json(exclude_defaults=True)
        arguments = (item_id, rater_id, int(response.skipped), text)
        state, outcome, counters = self._answer(keys, arguments)
        return _state(state), Outcome(outcome.decode()), _counters(_paired(counters))

    def undo(
        self, comparison_id: str, rater_id: str
    ) -> tuple[ComparisonState | None, str | None, Counters]:
        """Take back the last answer; return the comparison's state, the item, and the progress.

        The item is None, and nothing is changed, if there is no such answer or the comparison is
        not running.
        """
        state, item, counters = self._undo(_answer_keys(comparison_id, rater_id), ())
        return _state(state), item.decode() or None, _counters(_paired(counters))

    def answers(self, comparison_id: str, rater_id: str) -> list[Answer]:
        """Read all answers of one rater, in the order of the items."""
        found = self._redis.hvals(_answers_key(comparison_id, rater_id))
        with readable("A vote"):  # none is left out of a result in silence
            answers = [Answer.model_validate_json(text) for text in cast("list[bytes]", found)]
        return sorted(answers, key=lambda answer: answer.number)

    def texts(self, comparison_id: str, rater_ids: list[str]) -> Iterator[bytes]:
        """Yield the answers of raters as they are stored, in an order that follows from them."""
        for rater_id in sorted(rater_ids):
            yield rater_id.encode()
            found = self._redis.hvals(_answers_key(comparison_id, rater_id))
            yield from sorted(cast("list[bytes]", found))


def _script(redis: Redis, name: str) -> Callable[[tuple[str, ...], tuple[Any, ...]], Any]:
    text = (files("service.comparisons.rating") / "lua" / f"{name}.lua").read_text(encoding="utf-8")
    script = redis.register_script(text)
    return lambda keys, args: script(keys=keys, args=args)


def _answer_keys(comparison_id: str, rater_id: str) -> tuple[str, str, str]:
    return (
        redis_keys.comparison(comparison_id),
        _answers_key(comparison_id, rater_id),
        _progress_key(comparison_id, rater_id),
    )


def _given_key(comparison_id: str, rater_id: str) -> str:
    return redis_keys.comparison_part(comparison_id, f"given:{rater_id}")


def _answers_key(comparison_id: str, rater_id: str) -> str:
    return redis_keys.comparison_part(comparison_id, f"answers:{rater_id}")


def _progress_key(comparison_id: str, rater_id: str) -> str:
    return redis_keys.comparison_part(comparison_id, f"progress:{rater_id}")


def _items_key(comparison_id: str) -> str:
    return redis_keys.comparison_part(comparison_id, "items")


def _encode_given(given: Given) -> str:
    item = given.item
    side = "left" if item.candidate_left else "right"
    # Raters of large comparisons are given a thousand: a line is parsed faster than JSON.
    return f"{given.id} {item.pair_id} {item.kind.value} {side} {int(item.is_repeat)}"


def _decode_given(place: int, text: bytes) -> Given:
    name, pair_id, kind, side, repeat = text.decode().split(" ")
    return Given(name, place, Item(pair_id, PairKind(kind), side == "left", repeat == "1"))


def _state(text: bytes | None) -> ComparisonState | None:
    return None if text is None else ComparisonState(text.decode())


def _paired(flat: list[bytes]) -> dict[bytes, bytes]:
    return dict(zip(flat[::2], flat[1::2], strict=True))


def _counters(fields: dict[bytes, bytes]) -> Counters:
    last = fields.get(b"last")
    return Counters(
        training=int(fields.get(b"training", 0)),
        done=int(fields.get(b"done", 0)),
        skipped=int(fields.get(b"skipped", 0)),
        undone=int(fields.get(b"undone", 0)),
        last=None if last is None else last.decode(),
    )
