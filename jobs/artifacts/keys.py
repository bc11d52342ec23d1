"""What a key may be, and what a listing says of each artifact. Both kinds of store hold to it."""

import re
from dataclasses import dataclass
from datetime import datetime

from jobs.errors import ArtifactRefused

_KEY = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*")


@dataclass(frozen=True, slots=True)
class Stored:
    """One artifact, as a listing shows it; `modified_at` is the store's clock, in UTC."""

    key: str
    bytes: int
    modified_at: datetime


def is_key(key: str) -> bool:
    return _KEY.fullmatch(key) is not None


def checked_key(key: str) -> str:
    """Return `key`.

    Raises:
        ArtifactRefused: it is malformed: absolute, with `..`, hidden, or with odd characters.
    """
    if not is_key(key):
        raise ArtifactRefused(
            f"The artifact key {key[:100]!r} is refused: a key is made of names of letters, "
            f"digits, '.', '_' and '-', joined by '/', and no name starts with a dot."
        )
    return key
