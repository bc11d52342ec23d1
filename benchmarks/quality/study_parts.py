"""Run studies side by side within a time limit, and pack what each has found as it ends.

A part is one study: commands that run one after the other, once other parts are finished. At its
limit a command gets Ctrl-C's signal, after which the toolkit's commands can go on. What a part has
found is packed without weights, videos and points, so that it fits where little room is. An
archive of a study that was stopped holds its units: unpacked elsewhere, the study goes on there,
once its points have been recorded again. The work folder and each archive say what was studied and
how; another study neither takes them up nor writes over them.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import report
from benchmarks.archives import packed, unpack
from quant.weights.writer import write_whole

Words = tuple[object, ...]
"""A module and its arguments, as after `python -m`."""

FINISHED, STOPPED, FAILED, LEFT = "finished", "stopped", "failed", "left for another time"

MOST_BYTES = 16 << 20
"""Of an archive."""
_UNITS = "units.jsonl"
_IDENTITY = "studies.json"
_PACKED = (".json", ".jsonl", ".csv", ".png", ".html", ".toml")
_SOFTLY_S = 20.0
"""How long a command may take to end after the signal."""


@dataclass(frozen=True, slots=True)
class Part:
    """One study.

    Attributes:
        name: also of its folder in the work folder; its logs and archive are named after it.
        commands: in order; each runs in a process of its own.
        limit_s: seconds after which it is stopped.
        after: names of parts that have to be finished before.
        is_study: whether its folder is a study's. Of others, such as points, logs alone are packed.
        goes_on: whether a stopped one goes on from its archive. Videos are not packed, and those
            that a study has made are not made again, so a study of videos ends where it began.
    """

    name: str
    commands: tuple[Words, ...]
    limit_s: float
    after: tuple[str, ...] = ()
    is_study: bool = True
    goes_on: bool = True


@dataclass(slots=True)
class Shop:
    """Where parts run, and what became of them.

    Attributes:
        work: has a folder for each part, logs, and a file for each command that has ended well.
        keep: gets the archives and a summary.
        ends: when everything has to be over, by `time.monotonic`.
        identity: what the results of all parts depend on, by its name for people.
        least_s: a command is not begun if less is left, as loading takes long.
        states, seconds: by part.
    """

    work: Path
    keep: Path
    ends: float
    identity: Mapping[str, str]
    least_s: float = 20
    states: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    _stop: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        """Take the work folder, new or of the same studies.

        Raises:
            ValueError: it holds other ones, or some that do not say what they are of.
        """
        file = self.work / _IDENTITY
        if file.exists():
            self._check(file.read_text(), self.work)
        elif any(self.work.glob("*.log")):
            self._check(None, self.work)
        write_whole(file, json.dumps(dict(self.identity), indent=1).encode())

    def _check(self, text: str | None, where: Path) -> None:
        """Refuse what was studied of something else, or differently."""
        known = {} if text is None else json.loads(text)
        others = [name for name, value in self.identity.items() if known.get(name) != value]
        if others:
            raise ValueError(
                f"{where} holds studies of another {' and '.join(others)}, or does not say which: "
                "name another folder, or delete it to begin anew"
            )

    def run(self, parts: Sequence[Part], chosen: Collection[str], together: int) -> None:
        """Run the chosen parts, at most `together` at once, in order as far as none has to wait.

        A part is left if one before it is not finished and does not get so.
        """
        named = {part.name: part for part in parts}
        waiting = [part for part in parts if part.name in chosen]
        running: dict[Future[str], Part] = {}
        with ThreadPoolExecutor(together) as pool:
            try:
                while waiting or running:
                    for part in list(waiting):
                        if not all(self.is_finished(named[name]) for name in part.after):
                            continue
                        waiting.remove(part)
                        running[pool.submit(self._run_part, part)] = part
                    if not running:
                        break
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        self._note(running.pop(future), future.result())
            finally:
                self._stop.set()
        for part in waiting:
            self._note(part, LEFT)

    def is_finished(self, part: Part) -> bool:
        """Return whether all commands of a part have ended well, here or where it was packed."""
        return all(self._done(part, number).exists() for number in range(len(part.commands)))

    def _run_part(self, part: Part) -> str:
        started = time.monotonic()
        until = min(started + part.limit_s, self.ends)
        state = FINISHED
        for number, words in enumerate(part.commands):
            if self._done(part, number).exists():
                continue
            if self._stop.is_set() or until - time.monotonic() < self.least_s:
                state = LEFT if state == FINISHED and number == 0 else STOPPED
                break
            state = self._run(part, number, words, until)
            if state != FINISHED:
                break
        self.seconds[part.name] = round(time.monotonic() - started, 1)
        if state != LEFT:
            self.pack(part)
        return state

    def _run(self, part: Part, number: int, words: Words, until: float) -> str:
        """Run one command; stop it softly when its time is over."""
        command = [sys.executable, "-m", *map(str, words)]
        log_file = self.work / f"{part.name}.{number}.log"
        with log_file.open("ab") as log:
            process = subprocess.Popen(
                command, cwd=report.ROOT, stdout=log, stderr=subprocess.STDOUT
            )
            try:
                while process.poll() is None:
                    if self._stop.is_set() or time.monotonic() > until:
                        process.send_signal(signal.SIGINT)
                        process.wait(_SOFTLY_S)
                        return STOPPED
                    time.sleep(0.1)
            except subprocess.TimeoutExpired:
                return STOPPED
            finally:
                process.kill()
                process.wait()
        if process.returncode:
            lines = log_file.read_text(errors="replace").splitlines()
            print(f"{part.name}: {lines[-1] if lines else 'no word'}", file=sys.stderr, flush=True)
            return FAILED
        self._done(part, number).touch()
        return FINISHED

    def pack(self, part: Part) -> None:
        """Write a part's archive: what it has found, its logs, and what it goes on from."""
        files = sorted(self.work.glob(f"{part.name}.*"))
        is_finished = self.is_finished(part)
        if not (part.is_study and is_finished):  # elsewhere its commands have to run
            files = [file for file in files if file.suffix != ".done"]
        if part.is_study and (is_finished or part.goes_on):
            inside = sorted((self.work / part.name).rglob("*"))
            files += [file for file in inside if file.is_file() and file.suffix in _PACKED]
        files.append(self.work / _IDENTITY)
        data = packed(self.work, files)
        if len(data) > MOST_BYTES:
            data = packed(self.work, [file for file in files if file.name != _UNITS])
        write_whole(self.keep / f"{part.name}.tar.xz", data)

    def unpack(self, kept: Path) -> None:
        """Take over the parts that archives in `kept` hold and the work folder lacks.

        Raises:
            ValueError: an archive is of other studies; nothing is taken over then.
        """
        archives = sorted(kept.glob("*.tar.xz"))
        for archive in archives:
            with tarfile.open(archive) as tar:
                inside = tar.extractfile(_IDENTITY) if _IDENTITY in tar.getnames() else None
                self._check(inside.read().decode() if inside else None, archive)
        for archive in archives:
            name = archive.name.partition(".")[0]
            if not (self.work / name).exists():
                unpack(archive, self.work)

    def _done(self, part: Part, number: int) -> Path:
        return self.work / f"{part.name}.{number}.done"

    def _note(self, part: Part, state: str) -> None:
        """Keep a part's state, and write the summary of all so far."""
        self.states[part.name] = state
        spent = f" after {self.seconds[part.name]} s" if part.name in self.seconds else ""
        print(f"{part.name}: {state}{spent}", file=sys.stderr, flush=True)
        file = self.keep / "summary.json"
        summary = json.loads(file.read_text()) if file.exists() else {}
        summary |= {
            name: {"state": each, "seconds": self.seconds.get(name)}
            for name, each in self.states.items()
        }
        file.write_text(json.dumps(summary, indent=1) + "\n")
