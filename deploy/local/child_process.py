"""A child process of the launcher: started with its own log, never left behind.

Each child leads its own session: Ctrl-C in the terminal reaches the launcher alone, which then
stops the children in the right order, and a child's own children (the worker's ffmpeg) end with
it. Restarting is not decided here.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

_TIED = Path(__file__).with_name("parent_death.py")
_POLL_S = 0.05
_TAIL_BYTES = 8192


class Child:
    """One process of the stack, with the name that messages use and the file it logs to."""

    def __init__(
        self, name: str, command: Sequence[str], *, log: Path, cwd: Path, env: Mapping[str, str]
    ) -> None:
        self.name = name
        self.log = log
        self._asked = False
        tied = [sys.executable, str(_TIED), str(os.getpid()), *command]
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                tied,
                cwd=cwd,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs; negative when a signal ended it."""
        return self._process.poll()

    def obituary(self) -> str:
        """How it ended, its last words, and where to read the rest, as one sentence."""
        code = self._process.poll()
        how = f"ended with exit code {code}"
        if code is not None and code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
        words = last_line(self.log)
        return f"the {self.name} {how}{': ' + words if words else ''} (log: {_shown(self.log)})"

    def ask_to_end(self) -> None:
        """Sends SIGTERM, once; returns at once.

        A second one would be an order to drop everything: the worker would leave the job in hand.
        """
        if self._asked:
            return
        self._asked = True
        with suppress(ProcessLookupError):
            self._process.terminate()

    def end(self, grace_s: float, in_a_hurry: Callable[[], bool]) -> None:
        """Asks it to end, waits at most `grace_s`, then kills it and all it started."""
        self.ask_to_end()
        deadline = time.monotonic() + grace_s
        while self._process.poll() is None and time.monotonic() < deadline and not in_a_hurry():
            time.sleep(_POLL_S)
        with suppress(ProcessLookupError, PermissionError):  # macOS says EPERM for an empty group
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def last_line(log: Path) -> str:
    """The last line with something on it, or nothing when the log is empty or missing."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def _shown(path: Path) -> str:
    """The path as seen from where the launcher was called, when it lies below."""
    with suppress(ValueError):
        return str(path.relative_to(Path.cwd()))
    return str(path)
