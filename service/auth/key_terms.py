"""Parse what an operator says about a key's limits and times."""

import re
from datetime import UTC, datetime, timedelta
from typing import Final

from jobs.errors import InvalidSpec
from jobs.record import now
from jobs.violations import outside

SPAN_BOUND: Final = "a number of days, hours or minutes, like 30d, 12h or 90m"
EXPIRY_BOUND: Final = (
    f"never, a date or time in UTC like 2027-01-31 or 2027-01-31T18:00, or {SPAN_BOUND}"
)

_SPAN = re.compile(r"(\d{1,5})([dhm])", re.ASCII)
_UNITS = {"d": "days", "h": "hours", "m": "minutes"}


def parse_span(text: str, field: str = "grace") -> timedelta:
    """Parse a length of time. Raises InvalidSpec."""
    found = _SPAN.fullmatch(text)
    if found is None:
        raise InvalidSpec([outside(field, text, SPAN_BOUND)])
    return timedelta(**{_UNITS[found[2]]: int(found[1])})


def parse_expiry(text: str) -> datetime | None:
    """Parse when a key expires; None for never. Raises InvalidSpec."""
    if text == "never":
        return None
    if _SPAN.fullmatch(text):
        return now() + parse_span(text)
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise InvalidSpec([outside("expires", text, EXPIRY_BOUND)]) from None
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)


def parse_quota(text: str) -> int | None:
    """Parse a quota; None for the service's default. Raises InvalidSpec."""
    if text == "default":
        return None
    if not re.fullmatch(r"[0-9]{1,9}", text, re.ASCII):
        raise InvalidSpec([outside("quota", text, "a whole number from 1, or default")])
    return int(text)


def parse_rate(text: str) -> str | None:
    """Parse a rate; None for the service's default. `KeyStore` checks the rest."""
    return None if text == "default" else text
