"""Parse what the command line says about a key's limits and times."""

import re
from datetime import UTC, datetime, timedelta
from typing import Final

from jobs.record import now
from service.auth.api_keys import KeyRefused

SPAN_BOUND: Final = "a number of days, hours or minutes, like 30d, 12h or 90m"
EXPIRY_BOUND: Final = (
    f"never, a date or time in UTC like 2027-01-31 or 2027-01-31T18:00, or {SPAN_BOUND}"
)

_SPAN = re.compile(r"(\d{1,5})([dhm])", re.ASCII)
_UNITS = {"d": "days", "h": "hours", "m": "minutes"}


def parse_span(text: str) -> timedelta:
    """Parse a length of time. Raises KeyRefused."""
    found = _SPAN.fullmatch(text)
    if found is None:
        raise KeyRefused(f"{text!r} is not {SPAN_BOUND}.")
    return timedelta(**{_UNITS[found[2]]: int(found[1])})


def parse_expiry(text: str) -> datetime | None:
    """Parse when a key expires; None for never. Raises KeyRefused."""
    if text == "never":
        return None
    if _SPAN.fullmatch(text):
        return now() + parse_span(text)
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise KeyRefused(f"{text!r} is not {EXPIRY_BOUND}.") from None
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)


def parse_quota(text: str) -> int | None:
    """Parse a quota; None for the service's default. Raises KeyRefused."""
    if text == "default":
        return None
    if not re.fullmatch(r"[0-9]{1,9}", text, re.ASCII):
        raise KeyRefused(f"the quota is {text!r}, which is neither a whole number nor default.")
    return int(text)


def parse_rate(text: str) -> str | None:
    """Parse a rate; None for the service's default. `KeyStore` checks the rest."""
    return None if text == "default" else text
