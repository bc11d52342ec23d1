"""Define the seat of a rater: the place in one comparison that a link opens, as a key would.

A link has the form `/rate#<comparison>.<rater>.<secret>`. Browsers send what follows the # to no
server, so it is in no log; the page posts it. As with keys, the secret is 256 random bits, and
Redis holds its SHA-256 (`service/auth/api_keys.py`).
"""

import hmac
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

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
        return f"{_PREFIX}{self.comparison_id}:{self.rater_id}"


SeatLookup = Callable[[str, str], Seat | None]
"""Reads a seat by the ids of comparison and rater; None if there is none, or it was withdrawn."""


def no_seats(_comparison_id: str, _rater_id: str) -> None:
    """Find no seat, for a gate without comparisons."""


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
