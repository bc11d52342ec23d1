"""Word the violations of a request: what was given, what would be accepted, and what to do."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Final

from pydantic_core import ErrorDetails

from jobs.errors import Violation
from jobs.text_rules import (
    CLEANED_BOUND,
    CLEANED_DETAIL,
    first_disallowed,
    is_emptied,
    is_visible,
)

MAX_SHOWN_CHARS: Final = 80
"""How many characters of an invalid value an error shows."""


def shown(value: object) -> object:
    """Make an invalid value fit for an error message: short, valid Unicode, and a JSON value."""
    if value is None or (isinstance(value, int | float) and abs(value) < 10**18):
        return value
    text = value if isinstance(value, str) else _as_json(value)
    cut = text[:MAX_SHOWN_CHARS].encode("utf-8", "backslashreplace").decode()
    return cut if len(text) <= MAX_SHOWN_CHARS else f"{cut}… ({len(text)} characters)"


def said(value: object) -> str:
    """Write an invalid value into a sentence, as JSON has it; text goes without quotes."""
    value = shown(value)
    return value if isinstance(value, str) else _as_json(value)


def more_unknown_fields(number: int, fields: Iterable[str]) -> Violation:
    """Build one violation for all unknown fields that are not listed one by one."""
    names = ", ".join(fields)
    detail = f"{number} more names are not fields; the fields are {names}."
    return Violation("body", None, f"an object with the fields {names}", detail)


def outside(field: str, value: object, bound: str, remedy: str = "") -> Violation:
    """Build the violation of a value that is not `bound`; `remedy` is added to the sentence."""
    detail = f"{field} is {said(value)}, which is not {bound}{remedy and f'; {remedy}'}."
    return Violation(field, shown(value), bound, detail)


def span_violations(
    field: str, value: float | None, span: tuple[float, float], mode: str | None
) -> Iterator[Violation]:
    """Find a number that is less or more than a span; `mode` is the mode whose own span it is."""
    least, most = span
    if value is None or least <= value <= most:
        return
    bound = f"{least:g} to {most:g}" if least < most else f"{least:g}"
    if mode is None:
        yield outside(field, value, bound)
    else:
        yield outside(field, value, f"{bound} in mode {mode}", "leave it out for the mode's own")


def not_one_of(field: str, value: object, allowed: Iterable[object], why: str) -> Violation:
    """Build the violation of a value that is not `allowed`; None for a value that is missing."""
    bound = f"one of {', '.join(map(str, allowed))}"
    subject = field if value is None else f"{field} {said(value)}"
    return Violation(field, shown(value), bound, f"{subject} {why}; use {bound}.")


def text_violations(prompt: str, negative_prompt: str | None) -> Iterator[Violation]:
    """Find what is wrong with the texts for any model."""
    if not any(map(is_visible, prompt)):
        yield Violation(
            "prompt",
            shown(prompt),
            "at least one visible character",
            "prompt is empty; say what the video shows.",
        )
    for field, text in (("prompt", prompt), ("negative_prompt", negative_prompt)):
        bad = first_disallowed(text or "")
        if bad is not None:
            yield Violation(
                field,
                shown(text),
                "text without control characters",
                f"{field} holds the character U+{ord(bad):04X}, which is not text; remove it.",
            )


def length_violations(
    field: str,
    text: str,
    bounds: tuple[int, int | None],
    count_tokens: Callable[[str], int | None] | None,
) -> Iterator[Violation]:
    """Find too many characters, or else, as this is slower to check, blanks and too many tokens.

    Args:
        bounds: the most characters, and the most tokens, if they are bounded.
        count_tokens: None if they cannot be counted; it may return None as well.
    """
    chars, most_tokens = bounds
    if len(text) > chars:
        detail = f"{field} has {len(text)} characters, which is more than {chars}."
        yield Violation(field, shown(text), f"at most {chars} characters", detail)
        return
    if field == "prompt" and is_emptied(text):
        yield Violation(field, shown(text), CLEANED_BOUND, CLEANED_DETAIL)
        return
    # A text with disallowed characters is refused anyway, and a tokenizer might fail on it.
    if count_tokens is None or most_tokens is None or first_disallowed(text):
        return
    tokens = count_tokens(text)
    if tokens is not None and tokens > most_tokens:
        detail = f"{field} has {tokens} tokens, which is more than {most_tokens}; shorten it."
        yield Violation(field, f"{tokens} tokens", f"at most {most_tokens} tokens", detail)


def from_pydantic(
    error: ErrorDetails, bounds: Mapping[str, str], remedies: Mapping[str, str]
) -> Violation:
    """Convert an error of a body's model to a violation.

    Args:
        bounds: what each field takes.
        remedies: what to do besides giving such a value, for some of the fields.
    """
    names = ", ".join(bounds)
    if not error["loc"]:
        detail = f"The body is not a JSON object; its fields are {names}."
        return Violation("body", None, f"an object with the fields {names}", detail)
    name = error["loc"][0]
    field = str(shown(str(name)))
    if error["type"] == "extra_forbidden":
        detail = f"{field or 'The empty name'} is not a field; the fields are {names}."
        return Violation(field, shown(error["input"]), f"one of the fields {names}", detail)
    bound = bounds[field]
    if error["type"] == "missing":
        return Violation(field, None, bound, f"{field} is missing; it takes {bound}.")
    return outside(field, error["input"], bound, remedies.get(field, ""))


def _as_json(value: object) -> str:
    """Write a value as JSON; what JSON has no form for (a huge number, a file) by its `repr`."""
    try:
        if isinstance(value, Mapping | list | tuple | str | int | float | None):
            return json.dumps(value, ensure_ascii=False, default=repr)
    except (RecursionError, ValueError):  # nested too deeply; an integer of thousands of digits
        return "too long to show"
    return repr(value)
