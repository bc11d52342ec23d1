"""How service and worker log: one line per event on stderr, as text or as one JSON object.

Each process says which ids belong to the event at hand (a job's, a request's, its own); they are in
every line, whoever wrote it. Configured once, by `main()`. Prompts are never logged: they belong to
the callers.
"""

import logging
from collections.abc import Callable, Collection, Mapping
from enum import StrEnum
from typing import Final

from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.json import JsonFormatter

Ids = Callable[[], Mapping[str, str]]
"""Says the ids of the event at hand, by name; cheap, because it is asked for every line."""


class LogFormat(StrEnum):
    TEXT = "text"
    JSON = "json"


def configure(log_format: LogFormat, ids: Ids, quiet: Collection[str] = ()) -> None:
    """Send INFO and above to stderr, but only WARNING and above of the loggers in `quiet`."""
    handler = logging.StreamHandler()
    handler.addFilter(_WithIds(ids))
    handler.setFormatter(_FORMATTERS[log_format]())
    # Not shown, and gathered for every line all the same unless told otherwise.
    logging.logMultiprocessing = False
    logging.logAsyncioTasks = False  # type: ignore[attr-defined]  # from Python 3.12 on
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
    for name in quiet:
        logging.getLogger(name).setLevel(logging.WARNING)


_TEXT: Final = "%(asctime)s %(levelname)s %(name)s [%(ids)s] %(message)s"


class _WithIds(logging.Filter):
    """Gives every record the ids: each under its name, and all as the text `ids`."""

    def __init__(self, ids: Ids) -> None:
        super().__init__()
        self._ids = ids

    def filter(self, record: logging.LogRecord) -> bool:
        ids = self._ids()
        record.ids = " ".join(ids.values()) or "-"
        vars(record).update(ids)
        return True


def _text() -> logging.Formatter:
    return logging.Formatter(_TEXT)


def _json() -> logging.Formatter:
    return JsonFormatter(
        ["levelname", "name", "message"],
        timestamp="time",
        rename_fields={"levelname": "level", "name": "logger", "exc_info": "exception"},
        # `color_message` is uvicorn's, for terminals.
        reserved_attrs=[*RESERVED_ATTRS, "ids", "color_message"],
    )


_FORMATTERS: Final = {LogFormat.TEXT: _text, LogFormat.JSON: _json}
