"""Keep a study's results in a folder, unit by unit, so that an interrupted study goes on.

study.json       the command, what the results depend on, and the state: running or finished
units.jsonl      one line for each finished unit of work
results.json     what the study found; with the tables, figures and page the last to be written
tables/*.csv
figures/*.png
index.html       the page, which needs no other file
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quant.calibration.calibrate import tool_version
from quant.errors import StudyError
from quant.studies.output.page import Page
from quant.studies.output.table import Table
from quant.weights.writer import write_whole

FORMAT_VERSION = 1
_STUDY, _UNITS, _RESULTS = "study.json", "units.jsonl", "results.json"

Json = dict[str, Any]


@dataclass(slots=True)
class StudyFolder:
    """The folder of one study. Create it with `open`.

    Attributes:
        command: the study, such as "analyze".
        identity: what the results depend on, by its name for people.
    """

    path: Path
    command: str
    identity: Mapping[str, str]
    _units: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path, command: str, identity: Mapping[str, str]) -> StudyFolder:
        """Make a new folder, or go on with one that the same study has begun.

        Raises:
            StudyError: the folder holds something else, another study or a finished one; or it
                cannot be written.
        """
        folder = cls(path, command, dict(identity))
        try:
            if path.exists():
                folder._resume()
            else:
                path.mkdir(parents=False)
                folder._write_state("running")
        except OSError as error:
            raise StudyError(
                f"cannot write the study's folder {path}: {error.strerror or error}"
            ) from error
        return folder

    @classmethod
    def finished(cls, path: Path, command: str) -> StudyFolder:
        """Open the folder of a finished study to read its units.

        Raises:
            StudyError: it holds another study, or one that is not finished.
        """
        state = _finished_state(path, command)
        return cls(path, command, state["identity"], _read_units(path / _UNITS))

    def unit(self, name: str) -> Any | None:
        """Return what an earlier run has kept for a unit of work, or None."""
        return self._units.get(name)

    def keep(self, name: str, value: Any) -> None:
        """Keep the result of a unit of work, on disk when this returns.

        Args:
            value: what JSON can hold; numbers that are not finite are refused.

        Raises:
            StudyError: a number is not finite, or the disk cannot take it.
        """
        try:
            line = json.dumps({"unit": name, "value": value}, allow_nan=False)
        except ValueError as error:
            raise StudyError(
                f"{name} of {self.command} gave NaN or infinity: check the model's weights with "
                "`python -m quant calibrate`, which names the layer"
            ) from error
        try:
            with (self.path / _UNITS).open("a", encoding="utf-8") as file:
                file.write(f"{line}\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise StudyError(
                f"cannot write {self.path / _UNITS}: {error.strerror or error}; make room for it, "
                "and the same command goes on from here"
            ) from error
        self._units[name] = json.loads(line)["value"]

    def finish(
        self,
        results: Json,
        tables: Mapping[str, Table],
        figures: Mapping[str, bytes],
        page: Page,
    ) -> None:
        """Write results, tables, figures and the page, and mark the study as finished.

        Args:
            tables, figures: by their name without ending; a figure is a PNG.

        Raises:
            StudyError: the disk cannot take it; the same command then writes them again.
        """
        try:
            for folder in ("tables", "figures"):
                (self.path / folder).mkdir(exist_ok=True)
            for name, table in tables.items():
                write_whole(self.path / "tables" / f"{name}.csv", table.csv().encode())
            for name, picture in figures.items():
                write_whole(self.path / "figures" / f"{name}.png", picture)
            write_whole(self.path / "index.html", page.html().encode())
            text = json.dumps(results, indent=1, allow_nan=False, ensure_ascii=False)
            write_whole(self.path / _RESULTS, f"{text}\n".encode())
            self._write_state("finished")
        except OSError as error:
            raise StudyError(
                f"cannot write the results to {self.path}: {error.strerror or error}; make room, "
                "and the same command writes them again"
            ) from error

    def _resume(self) -> None:
        known = read_state(self.path)
        if known["command"] != self.command:
            raise StudyError(
                f"{self.path} holds the study {known['command']!r}, not {self.command!r}: name "
                "another folder"
            )
        others = [
            name for name, value in self.identity.items() if known["identity"].get(name) != value
        ]
        if others:
            raise StudyError(
                f"{self.path} holds a study of another {' and '.join(others)}: name another "
                "folder, or delete it to begin anew"
            )
        if known["state"] == "finished":
            raise StudyError(
                f"{self.path} holds this very study, finished: read {self.path / 'index.html'}, "
                "or delete the folder to begin anew"
            )
        self._units = _read_units(self.path / _UNITS)

    def _write_state(self, state: str) -> None:
        text = {
            "format_version": FORMAT_VERSION,
            "command": self.command,
            "tool_version": tool_version(),
            "identity": dict(self.identity),
            "state": state,
        }
        data = json.dumps(text, indent=1, ensure_ascii=False)
        write_whole(self.path / _STUDY, f"{data}\n".encode())


def read_state(path: Path) -> Json:
    """Return what `study.json` of a study's folder says.

    Raises:
        StudyError: the folder is not a study's, or of a newer version.
    """
    try:
        known = json.loads((path / _STUDY).read_text(encoding="utf-8"))
        version = known["format_version"]
        state: Json = {name: known[name] for name in ("command", "identity", "state")}
        state["tool_version"] = str(known.get("tool_version", "not known"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StudyError(f"{path} is not the folder of a study: name another one") from error
    if version != FORMAT_VERSION:
        raise StudyError(
            f"{path} has version {version!r} of the format; this tool reads {FORMAT_VERSION}"
        )
    return state


def read_results(path: Path, command: str) -> Json:
    """Return the results of a finished study.

    Raises:
        StudyError: the folder holds another study, or one that is not finished.
    """
    _finished_state(path, command)
    try:
        results: Json = json.loads((path / _RESULTS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StudyError(f"{path / _RESULTS} cannot be read: {error}") from error
    return results


def _finished_state(path: Path, command: str) -> Json:
    state = read_state(path)
    if state["command"] != command or state["state"] != "finished":
        raise StudyError(
            f"{path} holds {state['command']!r}, {state['state']}, where a finished {command!r} "
            "is wanted: run that command first"
        )
    return state


def _read_units(path: Path) -> dict[str, Any]:
    """Read the finished units; a last line that a kill has torn is cut off."""
    if not path.exists():
        return {}
    units: dict[str, Any] = {}
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    for line in whole.splitlines():
        entry = json.loads(line)
        units[entry["unit"]] = entry["value"]
    if whole != data:
        write_whole(path, whole)
    return units
