"""Take a time with its zone as a query parameter."""

import re
from typing import Annotated

from pydantic import AwareDatetime, BeforeValidator


def _written_as_a_date(value: object) -> object:
    """Refuse a number, which pydantic would take for seconds since 1970."""
    if isinstance(value, str) and re.match(r"\d{4}-\d\d-\d\d", value) is None:
        raise ValueError("write it like 2026-11-30T12:00:00Z")
    return value


Moment = Annotated[AwareDatetime, BeforeValidator(_written_as_a_date)]
