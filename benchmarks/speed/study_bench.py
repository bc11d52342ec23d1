"""Run the toolkit's commands for a benchmark, each in a process of its own, and measure them.

Seconds, memory of device and host, and a kill at a given moment; what is measured is saved after
each command, and packed for a machine that is given back.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import torch

from benchmarks import report
from benchmarks.archives import packed
from benchmarks.report import Row
from benchmarks.timing import device_name
from quant.weights.writer import write_whole

Words = tuple[object, ...]
"""Of a command line."""

ANALYSIS = "analysis"
"""Name of the folder whose state is packed."""
_GIB = 2**30
_COUNT = re.compile(r"(\d+)/\d+ \[")


@dataclass(frozen=True, slots=True)
class Run:
    """A command that has run, or was killed.

    Attributes:
        log: what it wrote.
    """

    seconds: float
    host_bytes: int
    host_anonymous_bytes: int
    device_bytes: int
    log: str

    @property
    def passes(self) -> int:
        """Return how many passes its progress bar showed last."""
        found = _COUNT.findall(self.log)
        return int(found[-1]) if found else 0


@dataclass(slots=True)
class Bench:
    """Where and how the commands run, and what was measured so far.

    Attributes:
        archive: gets results, logs and the analysis' units after each command.
        ends: when a command is killed, and the run ends, by `time.perf_counter`.
    """

    work: Path
    device: str
    device_gb: float
    settings: dict[str, object]
    archive: Path | None = None
    ends: float = math.inf
    rows: list[Row] = field(default_factory=list)

    def run(self, name: str, *words: object, until: Callable[[], bool] | None = None) -> Run:
        """Run a command of the toolkit; kill it once `until` is true, if that is given.

        Raises:
            SystemExit: it fails, ends before it could be killed, or is cut as time is up.
        """
        peaks, log = self.work / f"{name}.json", self.work / f"{name}.log"
        peaks.unlink(missing_ok=True)
        command = [sys.executable, "-m", "benchmarks.speed.study_case", peaks, self.device_gb]
        command += [*words, "--device", self.device]
        started = time.perf_counter()
        with log.open("wb") as file:
            process = subprocess.Popen(
                [*map(str, command)], cwd=report.ROOT, stdout=file, stderr=subprocess.STDOUT
            )
            try:
                while process.poll() is None and not (until is not None and until()):
                    if time.perf_counter() > self.ends:
                        self._cut(name, time.perf_counter() - started)
                    time.sleep(0.01)
                if until is not None:
                    process.send_signal(signal.SIGKILL)
                code = process.wait()
            finally:
                process.kill()
                process.wait()
        seconds = time.perf_counter() - started
        text = log.read_text(errors="replace")
        if code != (0 if until is None else -signal.SIGKILL):
            sys.exit(f"{name} ended with {code}:\n{text[-4000:]}")
        if not peaks.exists():
            sys.exit(f"{name} was killed before it had begun: give it more seconds")
        return Run(seconds, **json.loads(peaks.read_text()), log=text)

    def _cut(self, name: str, seconds: float) -> NoReturn:
        self.keep(Row(f"{name}: seconds until the run's end cut it", round(seconds, 1), "s"))
        sys.exit(f"time is up during {name}: what was measured before is kept")

    def add(self, name: str, run: Run) -> None:
        """Keep a command's seconds and memory."""
        self.keep(
            Row(f"{name}: seconds", round(run.seconds, 1), "s"),
            Row(f"{name}: device memory reserved at most", _gib(run.device_bytes), "GiB"),
            Row(f"{name}: host memory resident at most", _gib(run.host_bytes), "GiB"),
            Row(f"{name}: of it not backed by files", _gib(run.host_anonymous_bytes), "GiB"),
        )

    def keep(self, *rows: Row) -> None:
        """Keep rows, and write all that there are."""
        self.rows += report.log_rows(rows)
        saved = report.save(self.document)
        if self.archive is not None:
            data = packed(self.work, [*sorted(self.work.glob("*.log")), *_states(self.work)])
            write_whole(self.archive, data)
            shutil.copy(saved, self.archive.parent)

    @property
    def document(self) -> dict[str, object]:
        """Return the result so far."""
        name = device_name(torch.device(self.device))
        return report.result(f"studies-14b-{self.settings['part']}", name, self.settings, self.rows)


def check_goes_on(kept: Sequence[bytes], again: Sequence[bytes]) -> None:
    """Check that a second start has kept what the killed one had finished.

    Args:
        kept, again: units of the killed run and of the next, in their order.

    Raises:
        SystemExit: it has not, or nothing was finished.
    """
    if not kept:
        sys.exit("analyze had finished nothing when it was killed: give more seconds (--analyze-s)")
    if list(again[: len(kept)]) != list(kept):
        sys.exit(
            f"analyze did not go on after the kill: of {len(kept)} units that were finished the "
            f"second start left {sum(a == b for a, b in zip(kept, again, strict=False))}"
        )


def lines(file: Path) -> list[bytes]:
    """Return a file's whole lines; none if it does not exist yet."""
    return file.read_bytes().split(b"\n")[:-1] if file.exists() else []


def _states(work: Path) -> list[Path]:
    """Return the files that an analysis goes on from elsewhere, if there is one."""
    files = [work / ANALYSIS / name for name in ("study.json", "units.jsonl")]
    return [file for file in files if file.exists()]


def _gib(count: int) -> float:
    return round(count / _GIB, 2)
