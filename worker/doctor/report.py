"""Collect what the checks find, and print it for people or as JSON, without secrets."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal
from urllib.parse import urlsplit

from jobs.errors import AppError
from quant.errors import QuantError
from worker.errors import StartError

Status = Literal["ok", "note", "failed", "skipped"]

_SECRETS: Final = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
_LEAST_SECRET: Final = 4
_MARKS: Final = {"ok": "ok     ", "note": "note   ", "failed": "FAILED ", "skipped": "skipped"}


_REMEDIES: Final = {
    "Redis": "start Redis or Valkey, or correct REDIS_URL",
    "artifact store": "mount the store, let this user write to it, or correct ARTIFACTS_URL",
    "configuration": "correct the file, or name another with --config or WORKER_CONFIG",
    "model folder": "copy the model again, whole, or correct path in [model] of the configuration",
    "scales": "run the command that the line names, or leave the mode out",
    "device": "do what the line says, or set WORKER_DEVICE to auto or cpu",
    "memory plan": "do what the line says, or use a larger card",
    "kernels": "do what the line says, or leave the mode out",
    "model": "do what the line says; if it names a file, copy it again",
}
"""What to do where a check ends with a sentence of the worker's own; it says more in itself."""


class Fault(Exception):
    """A check found something that prevents the worker from serving."""

    def __init__(self, detail: str, remedy: str) -> None:
        super().__init__(detail)
        self.remedy = remedy


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check found that works.

    Attributes:
        note: what works less well than it could, and the remedy.
        figures: numbers by name; the unit ends the name.
        value: for later checks; not in the report.
    """

    detail: str
    note: str | None = None
    figures: Mapping[str, float | str] = field(default_factory=dict)
    value: Any = None


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the report; `remedy` of a failed one is never empty."""

    name: str
    status: Status
    detail: str
    remedy: str = ""
    seconds: float = 0.0
    figures: Mapping[str, float | str] = field(default_factory=dict)


class Report:
    """The checks that were made, in their order."""

    def __init__(self, show: Callable[[str], None] = lambda _line: None) -> None:
        """Start an empty report; `show` receives each line as soon as it is known."""
        self.checks: list[Check] = []
        self.values: dict[str, Any] = {}
        self.device_lost = False
        self._show = show
        self._secrets = [os.environ[name] for name in _SECRETS if os.environ.get(name)]

    @property
    def is_sound(self) -> bool:
        """Whether no check failed."""
        return all(check.status != "failed" for check in self.checks)

    def hide(self, secret: str | None) -> None:
        """Leave a text out of everything that the report says; too short ones are in many words."""
        if secret and len(secret) >= _LEAST_SECRET:
            self._secrets.append(secret)

    def run(self, name: str, look: Callable[[], Finding | None], needs: Sequence[str] = ()) -> Any:
        """Make a check, if those that it needs have succeeded; return its finding's value.

        Args:
            look: returns None where there is nothing to check.
        """
        missing = [each for each in needs if each not in self.values]
        if missing:
            self._add(Check(name, "skipped", f"needs {' and '.join(missing)}"))
            return None
        started = time.perf_counter()
        try:
            found = look()
        except Exception as error:  # noqa: BLE001  # of any library: the report is about them
            seconds = time.perf_counter() - started
            detail, remedy = _explain(name, error)
            self.device_lost |= _says_lost(error)
            self._add(Check(name, "failed", detail, remedy, seconds))
            return None
        if found is None:
            self._add(Check(name, "skipped", "does not apply here"))
            return None
        self.values[name] = found.value
        seconds = time.perf_counter() - started
        status: Status = "ok" if found.note is None else "note"
        self._add(Check(name, status, found.detail, found.note or "", seconds, found.figures))
        return found.value

    def to_json(self) -> str:
        """Return the whole report as JSON."""
        checks = [asdict(check) for check in self.checks]
        return json.dumps({"sound": self.is_sound, "checks": checks}, indent=2, default=str)

    def summary(self, sound: str = "This worker can serve.") -> str:
        """Return the last line for people; `sound` is the line if nothing failed."""
        failed = [check.name for check in self.checks if check.status == "failed"]
        if failed:
            return f"This worker cannot serve: {', '.join(failed)} failed."
        return sound

    def _add(self, check: Check) -> None:
        clean = Check(
            check.name,
            check.status,
            self._redact(check.detail),
            self._redact(check.remedy),
            round(check.seconds, 3),
            {
                name: self._redact(value) if isinstance(value, str) else value
                for name, value in check.figures.items()
            },
        )
        self.checks.append(clean)
        for line in _lines(clean):
            self._show(line)

    def _redact(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return re.sub(r"(://[^/\s:@]*):[^/\s@]+@", r"\1:***@", " ".join(text.split()))


def without_secrets(url: str) -> str:
    """Return a URL without user, password and query."""
    parts = urlsplit(url)
    place = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{place}{parts.path}"


def _lines(check: Check) -> list[str]:
    seconds = f" ({check.seconds:.1f} s)" if check.seconds >= 0.1 else ""
    lines = [f"{_MARKS[check.status]} {check.name}: {check.detail}{seconds}"]
    lines += [f"            {name}: {value}" for name, value in check.figures.items()]
    if check.remedy:
        lines.append(f"          -> {check.remedy}")
    return lines


def _explain(name: str, error: Exception) -> tuple[str, str]:
    """Return what is wrong and the remedy."""
    if isinstance(error, Fault):
        return str(error), error.remedy
    if isinstance(error, StartError | QuantError | AppError):
        return str(error), _REMEDIES.get(name, "do what the line says")
    return (
        f"{type(error).__name__}: {str(error)[:500]}",
        "this is not expected: send the report back, with the worker's log of its start",
    )


def _says_lost(error: Exception) -> bool:
    # Imported here: the report itself needs no torch.
    from worker.device import is_lost  # noqa: PLC0415

    return is_lost(error)
