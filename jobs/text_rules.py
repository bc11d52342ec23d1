"""Decide which characters a prompt may contain, and which of them are visible; bound metadata."""

import html
import unicodedata
from collections.abc import Mapping
from typing import Final

import ftfy

_BLANKS = frozenset("\u115f\u1160\u2800\u3164\uffa0")
"""Blank, although Unicode calls them letters or symbols: Hangul fillers, empty Braille pattern."""
CLEANED_BOUND = "at least one visible character, once HTML entities are read as the model does"
CLEANED_DETAIL = (
    "prompt holds only HTML entities or damaged text that stand for blanks, so the model would see "
    "an empty one; say what the video shows."
)
_ALLOWED_CONTROLS = frozenset("\t\n\r")


MAX_METADATA: Final = 16
MAX_METADATA_NAME_CHARS: Final = 64
MAX_METADATA_VALUE_CHARS: Final = 512
METADATA_BOUND: Final = (
    f"an object of at most {MAX_METADATA} texts, with names of 1 to {MAX_METADATA_NAME_CHARS} "
    f"characters and values of at most {MAX_METADATA_VALUE_CHARS}"
)


def metadata_fault(metadata: Mapping[str, str]) -> str | None:
    """Say what is wrong with a caller's notes, as a sentence without its subject; None if nothing.

    Names and values are not repeated: they may be long, and no text.
    """
    if len(metadata) > MAX_METADATA:
        return f"has {len(metadata)} entries, which is more than {MAX_METADATA}"
    for number, (name, value) in enumerate(metadata.items(), start=1):
        if not 1 <= len(name) <= MAX_METADATA_NAME_CHARS:
            return (
                f"has a name of {len(name)} characters as number {number}; it takes 1 to "
                f"{MAX_METADATA_NAME_CHARS}"
            )
        if len(value) > MAX_METADATA_VALUE_CHARS:
            return (
                f"has a value of {len(value)} characters as number {number}; it takes at most "
                f"{MAX_METADATA_VALUE_CHARS}"
            )
        bad = first_disallowed(name + value)
        if bad is not None:
            return f"holds the character U+{ord(bad):04X}, which is not text, in number {number}"
    return None


def is_visible(character: str) -> bool:
    """Return whether a reader sees the character; combining marks alone do not count."""
    return not (
        character.isspace()
        or character in _BLANKS
        or unicodedata.category(character) in ("Cc", "Cf", "Mn", "Me")
    )


def cleaned(text: str) -> str:
    """Clean a prompt as diffusers' `prompt_clean` for Wan does."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split())


def is_emptied(prompt: str) -> bool:
    """Return whether a prompt that shows something is blank once cleaned, as with `&nbsp;`."""
    return any(map(is_visible, prompt)) and not any(map(is_visible, cleaned(prompt)))


def first_disallowed(text: str) -> str | None:
    """Return the first control character or half of a surrogate pair; None if there is none."""
    return next((c for c in text if _is_disallowed(c)), None)


def _is_disallowed(character: str) -> bool:
    category = unicodedata.category(character)
    return category == "Cs" or (category == "Cc" and character not in _ALLOWED_CONTROLS)
