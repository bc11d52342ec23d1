"""Define the seat of a rater: the place in one comparison that a link opens, as a key would.

A link has the form `/rate#<comparison>.<rater>.<secret>`. Browsers send what follows the # to no
server, so it is in no log; the page posts it. As with keys, the secret is 256 random bits, and
Redis holds its SHA-256 (`service/auth/api_keys.py`).
"""

import hmac
import re
from dataclasses import dataclass, field
from typing import Final, Protocol

from redis.client import Pipeline

from service.auth.api_keys import digest

_PREFIX: Final = "rater:"
_TOKEN = re.compile(r"([0-9a-f]{32})\.([0-9a-f]{12})\.([0-9a-f]{64})")
_ID = re.compile(_PREFIX + r"([0-9a-f]{32}):([0-9a-f]{12})")
_NOBODYS_SECRET: Final = "0" * 64


@dataclass(frozen=True, slots=True)
class Seat:
    """The place of one rater in one comparison."""

    comparison_id: str
    rater_id: str
    name: str
    secret_sha256: str = field(repr=False)

    @property
    def id(self) -> str:
        """What stands for the id of a key in sessions and in counts of requests."""
        return seat_id(self.comparison_id, self.rater_id)


class SeatReader(Protocol):
    """Reads seats; `service/comparisons/rating/raters.py` has the real one."""

    def seat(self, comparison_id: str, rater_id: str) -> Seat | None:
        """Return a seat; None if there is none, or it was withdrawn."""
        ...

    def queue_seat(self, pipe: Pipeline, comparison_id: str, rater_id: str) -> None:
        """Ask for a seat in a pipeline, which then has one more result."""
        ...

    def decode_seat(self, comparison_id: str, found: bytes | None) -> Seat | None:
        """Return the seat of such a result; None if there is none, or it was withdrawn."""
        ...


class NoSeats:
    """Finds no seat, for a gate without comparisons."""

    def seat(self, _comparison_id: str, _rater_id: str) -> None:
        """Find none."""

    def queue_seat(self, pipe: Pipeline, _comparison_id: str, _rater_id: str) -> None:
        """Ask for nothing; the result is nothing."""
        pipe.echo("")

    def decode_seat(self, _comparison_id: str, _found: bytes | None) -> None:
        """Find none."""


def seat_id(comparison_id: str, rater_id: str) -> str:
    """Return the id of a rater's seat."""
    return f"{_PREFIX}{comparison_id}:{rater_id}"


def link_token(comparison_id: str, rater_id: str, secret: str) -> str:
    """Return what a link has after the #."""
    return f"{comparison_id}.{rater_id}.{secret}"


def split_link(token: str) -> tuple[str, str, str] | None:
    """Split the token of a link into comparison, rater and secret; None if it is not one."""
    found = _TOKEN.fullmatch(token)
    return (found[1], found[2], found[3]) if found else None


def split_id(holder_id: str) -> tuple[str, str] | None:
    """Return the comparison and the rater of a seat's id; None for the id of a key."""
    found = _ID.fullmatch(holder_id)
    return (found[1], found[2]) if found else None


def opens(secret: str, seat: Seat | None) -> bool:
    """Return whether `secret` is that of the seat's link. Takes as long if there is no seat."""
    expected = digest(_NOBODYS_SECRET) if seat is None else seat.secret_sha256
    return hmac.compare_digest(digest(secret), expected) and seat is not None
