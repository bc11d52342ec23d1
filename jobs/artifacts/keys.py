"""Define valid artifact keys and the entries of a listing, for both kinds of store."""

import re
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from jobs.errors import ArtifactRefused

MARKER: Final = ".store-id"
"""The name of the marker, in the root of a store. It begins with a dot, so it is no artifact's."""

_KEY = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*")


@dataclass(frozen=True, slots=True)
class StoredArtifact:
    """One artifact in a listing; `modified_at` is by the store's clock, in UTC."""

    key: str
    bytes: int
    modified_at: datetime


def is_key(key: str) -> bool:
    """Return whether a text can be an artifact's key."""
    return _KEY.fullmatch(key) is not None


def checked_key(key: str) -> str:
    """Return `key`, if it is well-formed.

    Raises:
        ArtifactRefused: it is absolute, hidden, or contains `..` or disallowed characters.
    """
    if not is_key(key):
        raise ArtifactRefused(
            f"The artifact key {key[:100]!r} is refused: a key is made of names of letters, "
            f"digits, '.', '_' and '-', joined by '/', and no name starts with a dot."
        )
    return key
