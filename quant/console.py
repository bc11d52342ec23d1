"""Share what the toolkit's commands do alike: errors as sentences, bars, and options' values."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta

import typer
from tqdm import tqdm

from quant.errors import QuantError

INTERRUPTED = 130  # as a shell says that Ctrl-C ended a command
_LOG_EVERY_S = 30.0
"""How often a bar is written where nobody watches it grow, as in a log file."""
_SIZE = re.compile(r"(\d{1,5})x(\d{1,5})")


@contextmanager
def errors_as_sentences() -> Iterator[None]:
    """End the command with a one-sentence error instead of a traceback on a `QuantError`."""
    try:
        yield
    except QuantError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error


@contextmanager
def resumable() -> Iterator[None]:
    """End the command with one sentence on Ctrl-C: the same command goes on with what is kept."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("stopped: the same command goes on from here", err=True)
        raise typer.Exit(INTERRUPTED) from None


def progress_bar(total: int, unit: str, done: int = 0) -> tqdm[None]:
    """Return a bar on standard error, `done` of whose `total` were done by an earlier run."""
    every_s = 0.1 if sys.stderr.isatty() else _LOG_EVERY_S
    return tqdm(total=total, initial=done, unit=unit, mininterval=every_s, file=sys.stderr)


def write_line(text: str) -> None:
    """Write a line above a bar."""
    tqdm.write(text, file=sys.stderr)


def time_left(seconds: float) -> tuple[str, str]:
    """Return how long that is, as h:mm:ss, and when it will be over."""
    left = timedelta(seconds=round(seconds))
    return f"{left} (h:mm:ss)", f"{datetime.now().astimezone() + left:%Y-%m-%d %H:%M}"


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
