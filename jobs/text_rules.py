"""Decide which characters a prompt may contain, and which of them are visible."""

import html
import unicodedata

import ftfy

_BLANKS = frozenset("\u115f\u1160\u2800\u3164\uffa0")
"""Blank, although Unicode calls them letters or symbols: Hangul fillers, empty Braille pattern."""
CLEANED_BOUND = "at least one visible character, once HTML entities are read as the model does"
CLEANED_DETAIL = (
    "prompt holds only HTML entities or damaged text that stand for blanks, so the model would see "
    "an empty one; say what the video shows."
)
_ALLOWED_CONTROLS = frozenset("\t\n\r")


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
