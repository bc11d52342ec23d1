"""Store the raters of comparisons: who they are, and which link or key opens their seats.

A rater is never forgotten, because votes belong to raters: who is removed keeps the votes and loses
the seat. A comparison's raters are a hash of ids to JSON, deleted with the comparison.
"""

import secrets
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Final, cast

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field
from redis import Redis
from redis.client import Pipeline

from jobs import redis_keys
from jobs.errors import ComparisonConflict, ComparisonNotFound, InvalidSpec, RaterNotFound
from jobs.record import now
from jobs.violations import outside, shown
from service.auth.api_keys import digest
from service.auth.seats import Seat, link_token
from service.comparisons.model import ComparisonState
from service.comparisons.store import ComparisonStore, readable

MAX_RATERS: Final = 500
"""The most raters of a comparison, those who were removed included."""
MAX_NAME_CHARS: Final = 80
NAME_BOUND: Final = f"1 to {MAX_NAME_CHARS} characters without line breaks or other controls"


class Rater(BaseModel):
    """One rater of a comparison.

    Attributes:
        id: 12 random hex digits, which name the rater in votes and results.
        name: what operators call the rater, which only operators and the rater see.
        secret_sha256: that of the link's secret.
        key_owner: the owner of an API key of role rater that opens the seat, too.
        removed_at: when the seat was withdrawn.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    id: str
    name: str = Field(min_length=1, max_length=MAX_NAME_CHARS)
    secret_sha256: str
    created_at: AwareDatetime
    key_owner: str | None = None
    removed_at: AwareDatetime | None = None


class RaterStore:
    """All access to raters. Safe to share between threads; Redis errors are not caught."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._comparisons = ComparisonStore(redis)

    def add(self, comparison_id: str, name: str, key_owner: str | None = None) -> tuple[Rater, str]:
        """Add a rater. The second value is the token of the link, which is not stored.

        Raises:
            InvalidSpec: the name is empty, too long, or no text.
            ComparisonNotFound: there is no such comparison.
            ComparisonConflict: it has ended, has too many raters, or the key's owner is one.
        """
        if not 1 <= len(name.strip()) <= MAX_NAME_CHARS or not name.isprintable():
            raise InvalidSpec([outside("name", name, NAME_BOUND)])
        rater, token = _new(comparison_id, name.strip(), key_owner)

        def change(raters: dict[str, Rater]) -> Rater:
            self._refuse_ended(comparison_id)
            if len(raters) >= MAX_RATERS:
                raise ComparisonConflict(
                    f"Comparison {comparison_id} has {len(raters)} raters, which is the most; "
                    f"start another comparison with …/clone.",
                    comparison_id=comparison_id,
                )
            _refuse_second_seat(comparison_id, raters, rater)
            return rater

        self._change(comparison_id, change)
        if key_owner is not None:
            self._note_seat(key_owner, comparison_id, rater.id)
        return rater, token

    def new_link(self, comparison_id: str, rater_id: str) -> tuple[Rater, str]:
        """Give a rater another link; the old one and its sessions are void at once.

        Raises:
            RaterNotFound: there is no such rater, or it was removed.
        """
        secret = secrets.token_hex(32)

        def change(raters: dict[str, Rater]) -> Rater:
            rater = _present(comparison_id, raters, rater_id)
            return rater.model_copy(update={"secret_sha256": digest(secret)})

        return self._change(comparison_id, change), link_token(comparison_id, rater_id, secret)

    def remove(self, comparison_id: str, rater_id: str) -> None:
        """Withdraw a rater's seat for good; the votes stay. Removing again changes nothing.

        Raises:
            RaterNotFound: there never was such a rater.
        """

        def change(raters: dict[str, Rater]) -> Rater:
            if rater_id not in raters:
                raise _not_found(comparison_id, rater_id)
            rater = raters[rater_id]
            return rater.model_copy(update={"removed_at": rater.removed_at or now()})

        self._change(comparison_id, change)

    def claim(self, seat: Seat, key_owner: str) -> None:
        """Let an API key of role rater open a seat whose link its caller has, and go there first.

        Raises:
            ComparisonConflict: the seat belongs to another owner's key, or the owner has another.
        """

        def change(raters: dict[str, Rater]) -> Rater:
            rater = _present(seat.comparison_id, raters, seat.rater_id)
            if rater.key_owner not in (None, key_owner):
                raise ComparisonConflict(
                    "This link belongs to another rater's key; ask for a link of your own.",
                    comparison_id=seat.comparison_id,
                )
            claimed = rater.model_copy(update={"key_owner": key_owner})
            _refuse_second_seat(seat.comparison_id, raters, claimed)
            return claimed

        self._change(seat.comparison_id, change)
        self._note_seat(key_owner, seat.comparison_id, seat.rater_id)

    def all(self, comparison_id: str) -> list[Rater]:
        """Read all raters, those who were removed included, oldest first."""
        found = _read(self._redis, comparison_id)
        return sorted(found.values(), key=lambda rater: (rater.created_at, rater.id))

    def seat(self, comparison_id: str, rater_id: str) -> Seat | None:
        """Return a rater's seat; None if there is none, or it was withdrawn."""
        found = cast("bytes | None", self._redis.hget(_key(comparison_id), rater_id))
        return self.decode_seat(comparison_id, found)

    def queue_seat(self, pipe: Pipeline, comparison_id: str, rater_id: str) -> None:
        """Ask for a seat in a pipeline, which then has one more result."""
        pipe.hget(_key(comparison_id), rater_id)

    def decode_seat(self, comparison_id: str, found: bytes | None) -> Seat | None:
        """Return the seat of such a result; None if there is none, or it was withdrawn."""
        if found is None:
            return None
        rater = _decode(found)
        if rater.removed_at is not None:
            return None
        return Seat(comparison_id, rater.id, rater.name, rater.secret_sha256)

    def seat_of_key(self, key_owner: str, comparison_id: str | None = None) -> Seat | None:
        """Return the seat of an API key's owner: in that comparison, or where it went last.

        Without a comparison, one that has not ended goes first. None if the owner has no seat.
        """
        seats = self._seats_of_key(key_owner)
        if comparison_id is not None:
            chosen = [seat for seat in seats if seat.comparison_id == comparison_id]
            for seat in chosen:
                self._note_seat(key_owner, seat.comparison_id, seat.rater_id)
            return next(iter(chosen), None)
        is_open = (seat for seat in seats if not self._has_ended(seat.comparison_id))
        return next(is_open, None) or next(iter(seats), None)

    def _seats_of_key(self, key_owner: str) -> list[Seat]:
        index = redis_keys.rater_seats(key_owner)
        seats = []
        for member in cast("list[bytes]", self._redis.zrevrange(index, 0, -1)):
            comparison_id, rater_id = member.decode().split(":")
            seat = self.seat(comparison_id, rater_id)
            if seat is None:  # the comparison was deleted, or the rater removed
                self._redis.zrem(index, member)
            else:
                seats.append(seat)
        return seats

    def _note_seat(self, key_owner: str, comparison_id: str, rater_id: str) -> None:
        index = redis_keys.rater_seats(key_owner)
        self._redis.zadd(index, {f"{comparison_id}:{rater_id}": time.time()})

    def _has_ended(self, comparison_id: str) -> bool:
        state = self._redis.hget(redis_keys.comparison(comparison_id), "state")
        return state is None or ComparisonState(cast("bytes", state).decode()).is_final

    def _refuse_ended(self, comparison_id: str) -> None:
        comparison = self._comparisons.get(comparison_id)
        if comparison.state.is_final:
            raise ComparisonConflict(
                f"Comparison {comparison_id} is {comparison.state}, so nobody can join it; make a "
                f"copy of it with …/clone.",
                comparison_id=comparison_id,
                state=comparison.state.value,
            )

    def _change(self, comparison_id: str, change: Callable[[dict[str, Rater]], Rater]) -> Rater:
        """Read the raters and write one, repeated if another client wrote meanwhile."""

        def write(pipe: Pipeline) -> Rater:
            if not pipe.exists(redis_keys.comparison(comparison_id)):
                raise ComparisonNotFound(
                    f"There is no comparison {shown(comparison_id)}; GET /comparisons lists those "
                    f"there are.",
                    comparison_id=shown(comparison_id),
                )
            rater = change(_read(pipe, comparison_id))
            pipe.multi()
            pipe.hset(_key(comparison_id), rater.id, rater.model_dump_json())
            return rater

        watched = (redis_keys.comparison(comparison_id), _key(comparison_id))
        call = cast("Callable[[Pipeline], None]", write)  # redis-py's types know no other
        return cast("Rater", self._redis.transaction(call, *watched, value_from_callable=True))


def _new(comparison_id: str, name: str, key_owner: str | None) -> tuple[Rater, str]:
    secret = secrets.token_hex(32)
    rater = Rater(
        id=secrets.token_hex(6),
        name=name,
        secret_sha256=digest(secret),
        created_at=now(),
        key_owner=key_owner,
    )
    return rater, link_token(comparison_id, rater.id, secret)


def _refuse_second_seat(comparison_id: str, raters: dict[str, Rater], wanted: Rater) -> None:
    """Refuse a second seat for the owner of a key, who would count as two raters."""
    for rater in raters.values():
        if (
            wanted.key_owner is not None
            and rater.key_owner == wanted.key_owner
            and rater.id != wanted.id
            and rater.removed_at is None
        ):
            raise ComparisonConflict(
                f"The key of {wanted.key_owner} has a seat in comparison {comparison_id} already; "
                f"one person votes once.",
                comparison_id=comparison_id,
            )


def _present(comparison_id: str, raters: dict[str, Rater], rater_id: str) -> Rater:
    rater = raters.get(rater_id)
    if rater is None or rater.removed_at is not None:
        raise _not_found(comparison_id, rater_id)
    return rater


def _not_found(comparison_id: str, rater_id: str) -> RaterNotFound:
    return RaterNotFound(
        f"Comparison {comparison_id} has no rater {shown(rater_id)}; GET /comparisons/"
        f"{comparison_id} lists those it has.",
        comparison_id=comparison_id,
    )


def _read(redis: Redis, comparison_id: str) -> dict[str, Rater]:
    found = cast("dict[bytes, bytes]", redis.hgetall(_key(comparison_id)))
    return {name.decode(): _decode(text) for name, text in found.items()}


@lru_cache(maxsize=1024)
def _decode(text: bytes) -> Rater:
    with readable("A rater"):
        return Rater.model_validate_json(text)


def _key(comparison_id: str) -> str:
    return redis_keys.comparison_part(comparison_id, "raters")
