"""Store comparisons and their pairs in Redis.

A comparison is a hash with its JSON (`comparison`), its `state` and its `problem`; its pairs are a
second hash, of pair ids to JSON. Changes read what they depend on and write under WATCH, so any
number of processes may make them at once. Nothing expires. Redis errors are not caught.
"""

import logging
import secrets
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, TypeVar, cast

from redis import Redis
from redis.client import Pipeline

from jobs import redis_keys
from jobs.errors import ComparisonConflict, ComparisonNotFound, InvalidSpec, RecordUnreadable
from jobs.ids import cursor_after, is_id, new_id, parse_cursor
from jobs.violations import outside, shown
from service.comparisons.model import Comparison, ComparisonState, Pair

logger = logging.getLogger(__name__)

MAX_PAGE: Final = 100

_T = TypeVar("_T")
_VERBS: Final = {
    ComparisonState.RUNNING: "resumed",
    ComparisonState.PAUSED: "paused",
    ComparisonState.CLOSED: "closed",
    ComparisonState.CANCELLED: "cancelled",
}


@dataclass(frozen=True, slots=True)
class ComparisonPage:
    """Comparisons, newest first; `next_cursor` is None on the last page.

    Those that cannot be read are left out, with a line in the log.
    """

    comparisons: tuple[Comparison, ...]
    next_cursor: str | None


class ComparisonStore:
    """All access to comparisons. Safe to share between threads."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    def create(self, comparison: Comparison, pairs: Sequence[Pair]) -> None:
        """Store a new comparison with all its pairs, in one atomic step."""
        with self._redis.pipeline() as pipe:
            for name, text in _fields(comparison).items():
                pipe.hset(redis_keys.comparison(comparison.id), name, text)
            for pair in pairs:
                pipe.hset(_pairs_key(comparison.id), pair.id, _encode(pair))
            pipe.zadd(redis_keys.COMPARISONS, {comparison.id: 0})
            pipe.sadd(redis_keys.COMPARISONS_OPEN, comparison.id)
            pipe.execute()

    def get(self, comparison_id: str) -> Comparison:
        """Read a comparison. Raises ComparisonNotFound."""
        if not is_id(comparison_id):
            raise _not_found(comparison_id)
        found = self._redis.hgetall(redis_keys.comparison(comparison_id))
        return _decode(comparison_id, cast("dict[bytes, bytes]", found))

    def exists(self, comparison_id: str) -> bool:
        """Return whether there is such a comparison."""
        return bool(self._redis.exists(redis_keys.comparison(comparison_id)))

    def list(self, limit: int = 20, cursor: str | None = None) -> ComparisonPage:
        """Read up to `limit` comparisons, newest first.

        Raises:
            InvalidSpec: the limit is out of bounds, or the cursor malformed.
        """
        if not 1 <= limit <= MAX_PAGE:
            bound = f"a whole number from 1 to {MAX_PAGE}"
            raise InvalidSpec([outside("limit", limit, bound)])
        last = "+" if cursor is None else f"({parse_cursor(cursor)}"
        found = cast(
            "list[bytes]",
            self._redis.zrevrangebylex(redis_keys.COMPARISONS, last, "-", 0, limit + 1),
        )
        names = [name.decode() for name in found]
        with self._redis.pipeline(transaction=False) as pipe:
            for name in names[:limit]:
                pipe.hgetall(redis_keys.comparison(name))
            texts = pipe.execute()
        comparisons = []
        for name, fields in zip(names, texts, strict=False):
            try:
                if fields:  # it was not deleted between the two reads
                    comparisons.append(_decode(name, fields))
            except RecordUnreadable as error:
                logger.warning("%s", error)
        more = len(names) > limit
        return ComparisonPage(tuple(comparisons), cursor_after(names[limit - 1]) if more else None)

    def open_ids(self) -> tuple[str, ...]:
        """Return the ids of comparisons that may have something left to do, oldest first."""
        found = cast("set[bytes]", self._redis.smembers(redis_keys.COMPARISONS_OPEN))
        return tuple(sorted(name.decode() for name in found))

    def settle(self, comparison_id: str, is_done: Callable[[tuple[Pair, ...]], bool]) -> None:
        """Take a comparison off the open ones, if `is_done` says so of its pairs.

        A change of its state or of a pair makes it an open one again.
        """

        def change(pipe: Pipeline) -> None:
            found = cast("list[bytes]", pipe.hvals(_pairs_key(comparison_id)))
            done = is_done(tuple(map(_decode_pair, found)))
            pipe.multi()
            if done:
                pipe.srem(redis_keys.COMPARISONS_OPEN, comparison_id)

        self._change(change, redis_keys.comparison(comparison_id), _pairs_key(comparison_id))

    def change_state(
        self, comparison_id: str, to: ComparisonState, allowed: Collection[ComparisonState]
    ) -> Comparison:
        """Put a comparison into another state, from one of those allowed; return it.

        It is then looked at in the next round. Changing to the state that it has does nothing else.

        Raises:
            ComparisonNotFound: there is none of this id.
            ComparisonConflict: it is in another state than those allowed.
        """

        def change(pipe: Pipeline) -> Comparison:
            fields = cast("dict[bytes, bytes]", pipe.hgetall(redis_keys.comparison(comparison_id)))
            comparison = _decode(comparison_id, fields)
            if comparison.state is not to and comparison.state not in allowed:
                raise wrong_state(comparison, f"be {_VERBS[to]}")
            pipe.multi()
            pipe.hset(redis_keys.comparison(comparison_id), "state", to.value)
            pipe.sadd(redis_keys.COMPARISONS_OPEN, comparison_id)
            return comparison.model_copy(update={"state": to})

        return self._change(change, redis_keys.comparison(comparison_id))

    def set_problem(self, comparison_id: str, problem: str | None) -> None:
        """Note why nothing goes on, or that nothing is wrong. Raises ComparisonNotFound."""

        def change(pipe: Pipeline) -> None:
            if not pipe.exists(redis_keys.comparison(comparison_id)):
                raise _not_found(comparison_id)
            pipe.multi()
            pipe.hset(redis_keys.comparison(comparison_id), "problem", problem or "")

        self._change(change, redis_keys.comparison(comparison_id))

    def pairs(self, comparison_id: str) -> tuple[Pair, ...]:
        """Read all pairs, by their numbers; none if there is no such comparison."""
        found = cast("list[bytes]", self._redis.hvals(_pairs_key(comparison_id)))
        return tuple(sorted(map(_decode_pair, found), key=lambda pair: pair.number))

    def pair(self, comparison_id: str, pair_id: str) -> Pair:
        """Read one pair. Raises ComparisonNotFound."""
        found = cast("bytes | None", self._redis.hget(_pairs_key(comparison_id), pair_id))
        return _decode_pair(_checked(comparison_id, found))

    def update_pair(
        self, comparison_id: str, pair_id: str, change: Callable[[Pair], Pair | None]
    ) -> Pair:
        """Replace a pair by what `change` makes of it, and return it; None changes nothing.

        `change` may be called several times, if another process changes the pair meanwhile.

        Raises:
            ComparisonNotFound: the comparison was deleted; nothing is written.
        """

        def replace(pipe: Pipeline) -> Pair:
            found = cast("bytes | None", pipe.hget(_pairs_key(comparison_id), pair_id))
            before = _decode_pair(_checked(comparison_id, found))
            after = change(before)
            if after is None or after == before:
                pipe.multi()
                return before
            pipe.multi()
            pipe.hset(_pairs_key(comparison_id), pair_id, _encode(after))
            pipe.sadd(redis_keys.COMPARISONS_OPEN, comparison_id)
            return after

        return self._change(replace, _pairs_key(comparison_id))

    def delete(self, comparison_id: str) -> None:
        """Delete everything about a comparison in Redis; its files and jobs are left.

        Deleting a missing one is no error.
        """
        key = redis_keys.comparison(comparison_id)
        # First what finds it: a process that ends in between leaves nothing that can be seen.
        with self._redis.pipeline() as pipe:
            pipe.zrem(redis_keys.COMPARISONS, comparison_id)
            pipe.srem(redis_keys.COMPARISONS_OPEN, comparison_id)
            pipe.unlink(key, _pairs_key(comparison_id))
            pipe.execute()
        for part in self._redis.scan_iter(match=f"{key}:*", count=1000):
            self._redis.unlink(part)

    def _change(self, change: Callable[[Pipeline], _T], *watched: str) -> _T:
        """Run `change`, which reads, calls `multi` and queues writes, until nobody else wrote."""
        run = cast("Callable[..., _T]", self._redis.transaction)
        return run(change, *watched, value_from_callable=True)


def new_comparison_id() -> str:
    """Make an id that sorts by its time."""
    return new_id()[0]


def new_pair_id() -> str:
    """Make the id of a pair."""
    return secrets.token_hex(8)


def wrong_state(comparison: Comparison, what: str) -> ComparisonConflict:
    """Build the error for something that the comparison's state does not allow."""
    state = comparison.state
    remedy = "make a copy of it with …/clone" if state.is_final else "resume it first"
    return ComparisonConflict(
        f"Comparison {comparison.id} is {state.value}, so it cannot {what}; {remedy}.",
        comparison_id=comparison.id,
        state=state.value,
    )


def _not_found(comparison_id: str) -> ComparisonNotFound:
    name = shown(comparison_id)
    return ComparisonNotFound(
        f"There is no comparison {name}; GET /comparisons lists those there are.",
        comparison_id=name,
    )


def _pairs_key(comparison_id: str) -> str:
    return redis_keys.comparison_part(comparison_id, "pairs")


def _fields(comparison: Comparison) -> dict[str, str]:
    return {
        "comparison": comparison.model_dump_json(exclude={"state", "problem"}),
        "state": comparison.state.value,
        "problem": comparison.problem or "",
    }


def _encode(pair: Pair) -> str:
    return pair.model_dump_json(exclude_none=True)


# Most pairs are read again and again without a change: texts are compared faster than parsed.
@lru_cache(maxsize=2048)
def _decode_pair(text: bytes) -> Pair:
    with readable("A pair of this comparison"):
        return Pair.model_validate_json(text)


@lru_cache(maxsize=64)
def _decode_comparison(text: bytes) -> Comparison:
    return Comparison.model_validate_json(text)


@contextmanager
def readable(what: str) -> Iterator[None]:
    """Turn errors of parsing a stored text into RecordUnreadable, which says whose it may be."""
    try:
        yield
    except ValueError as error:  # pydantic's are, too
        raise RecordUnreadable(
            f"{what} cannot be read; a later version of the service may have written it. Update "
            f"this one, or delete the comparison."
        ) from error


def _decode(comparison_id: str, fields: dict[bytes, bytes]) -> Comparison:
    text = _checked(comparison_id, fields.get(b"comparison"))
    with readable(f"Comparison {comparison_id}"):
        return _decode_comparison(text).model_copy(
            update={
                "state": ComparisonState(fields[b"state"].decode()),
                "problem": fields[b"problem"].decode() or None,
            }
        )


def _checked(comparison_id: str, found: bytes | None) -> bytes:
    if found is None:
        raise _not_found(comparison_id)
    return found
