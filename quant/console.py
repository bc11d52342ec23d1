"""Share what the toolkit's commands do alike: errors as sentences, and options' values."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from quant.errors import QuantError

INTERRUPTED = 130  # as a shell says that Ctrl-C ended a command
_SIZE = re.compile(r"(\d{1,5})x(\d{1,5})")


@contextmanager
def errors_as_sentences() -> Iterator[None]:
    """End the command with a one-sentence error instead of a traceback on a `QuantError`."""
    try:
        yield
    except QuantError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error


def parse_size(text: str | None) -> tuple[int, int] | None:
    """Read (width, height) from an option such as 832x480.

    Raises:
        typer.BadParameter: the text is not of that form.
    """
    if text is None:
        return None
    match = _SIZE.fullmatch(text)
    if not match:
        raise typer.BadParameter(f"{text!r} is not WIDTHxHEIGHT, like 832x480", param_hint="--size")
    return int(match[1]), int(match[2])
