"""Configure logging for service and worker: one entry per event on stderr, as text or as JSON.

Each process passes a callback that returns the ids of the current event (of a job, of a request, of
the process itself). They are added to every line, also to those of libraries. `main()` calls
`configure` once. Prompts are never logged: they belong to the callers.
"""

import copy
import logging
import re
from collections.abc import Callable, Collection, Mapping
from enum import StrEnum
from typing import Final
from weakref import WeakKeyDictionary

from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.json import JsonFormatter

MOST_SAID: Final = 1000

_SAID: "WeakKeyDictionary[object, set[str]]" = WeakKeyDictionary()

GetIds = Callable[[], Mapping[str, str]]
"""Returns the ids of the current event, by name; must be cheap, as it is called for every line."""


class LogFormat(StrEnum):
    """The formats of log lines."""

    TEXT = "text"
    JSON = "json"


def configure(log_format: LogFormat, get_ids: GetIds, quiet: Collection[str] = ()) -> None:
    """Send INFO and above to stderr, but only WARNING and above from the loggers in `quiet`."""
    handler = logging.StreamHandler()
    handler.addFilter(_WithIds(get_ids))
    handler.setFormatter(_FORMATTERS[log_format]())
    # Neither is shown, but Python would collect both for every line.
    logging.logMultiprocessing = False
    logging.logAsyncioTasks = False  # type: ignore[attr-defined]  # from Python 3.12 on
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
    for name in quiet:
        logging.getLogger(name).setLevel(logging.WARNING)


_TEXT: Final = "%(asctime)s %(levelname)s %(name)s [%(ids)s] %(message)s"


class _WithIds(logging.Filter):
    """Adds the ids to every record: each under its name, and all together as the text `ids`."""

    def __init__(self, get_ids: GetIds) -> None:
        super().__init__()
        self._get_ids = get_ids

    def filter(self, record: logging.LogRecord) -> bool:
        ids = self._get_ids()
        record.ids = " ".join(ids.values()) or "-"
        vars(record).update(ids)
        return True


_CONTROLS: Final = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
"""Characters that move a cursor, break or reverse a line, or cannot be written at all."""


def _escape(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode()


class _TextFormatter(logging.Formatter):
    """Escapes control characters, which values from outside may contain, as JSON does anyway.

    Only the program's own text breaks lines: the message before its values are filled in, and
    tracebacks.
    """

    def format(self, record: logging.LogRecord) -> str:
        safe = copy.copy(record)
        if isinstance(record.args, tuple):
            safe.args = tuple(map(_one_line, record.args))
        elif record.args:
            safe.args = {name: _one_line(value) for name, value in record.args.items()}
        return _CONTROLS.sub(_escape, super().format(safe))


def _one_line(value: object) -> object:
    return value.replace("\n", "\\n") if isinstance(value, str) else value


def _text() -> logging.Formatter:
    return _TextFormatter(_TEXT)


def _json() -> logging.Formatter:
    return JsonFormatter(
        ["levelname", "name", "message"],
        timestamp="time",
        rename_fields={"levelname": "level", "name": "logger", "exc_info": "exception"},
        # uvicorn adds `color_message` for terminals.
        reserved_attrs=[*RESERVED_ATTRS, "ids", "color_message"],
    )


_FORMATTERS: Final = {LogFormat.TEXT: _text, LogFormat.JSON: _json}


def warn_once(logger: logging.Logger, reader: object, message: str) -> None:
    """Log a warning the first time that `reader` has it: some things are read every second.

    At most `MOST_SAID` messages are remembered for each reader, as long as it exists.
    """
    said = _SAID.setdefault(reader, set())
    if message in said:
        return
    if len(said) >= MOST_SAID:
        said.clear()
    said.add(message)
    logger.warning("%s", message)
