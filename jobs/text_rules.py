"""What counts as text: which characters a prompt may hold, and which of them a reader sees."""

import unicodedata

_BLANKS = frozenset("\u115f\u1160\u2800\u3164\uffa0")
"""Letters and a symbol to Unicode, but blank: the Hangul fillers and the empty Braille pattern."""
_ALLOWED_CONTROLS = frozenset("\t\n\r")


def is_visible(character: str) -> bool:
    """Whether a reader sees something; marks alone change nothing without a letter to stand on."""
    return not (
        character.isspace()
        or character in _BLANKS
        or unicodedata.category(character) in ("Cf", "Mn", "Me")
    )


def strange_in(text: str) -> str | None:
    """The first character which no text holds: a control character or half of a surrogate pair."""
    return next((c for c in text if _is_strange(c)), None)


def _is_strange(character: str) -> bool:
    category = unicodedata.category(character)
    return category == "Cs" or (category == "Cc" and character not in _ALLOWED_CONTROLS)
