"""Start a child process of the launcher with its own log, and stop it with all its descendants.

Each child leads its own session. So Ctrl-C in the terminal reaches only the launcher, which then
stops the children in the right order; and a child's own children (the worker's ffmpeg) are killed
with it. Restarts are not decided here.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

_WRAPPER = Path(__file__).with_name("parent_death.py")
MARK = "E2E_MARK"
"""The environment variable by which every process of one run is found."""

_POLL_S = 0.05
_TAIL_BYTES = 8192


class Child:
    """A running process with a name for messages and a log file."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        log: Path,
        cwd: Path,
        env: Mapping[str, str],
        umask: int = -1,
    ) -> None:
        """Start the process; `umask` is for the files that it makes, -1 for this process' own."""
        self.name = name
        self.log = log
        self._terminated = False
        wrapped = [sys.executable, str(_WRAPPER), str(os.getpid()), *command]
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                wrapped,
                cwd=cwd,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                umask=umask,
            )

    @property
    def pid(self) -> int:
        """The process id, which is also its session and process group."""
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while the process runs; negative if a signal ended it."""
        return self._process.poll()

    def describe_end(self) -> str:
        """Return how the process ended, its last line of output and its log, as one sentence."""
        code = self._process.poll()
        how = f"ended with exit code {code}"
        if code is not None and code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
        text = last_line(self.log)
        return f"the {self.name} {how}{': ' + text if text else ''} (log: {_relative(self.log)})"

    def terminate(self) -> None:
        """Send SIGTERM, and do not wait; further calls do nothing.

        A second SIGTERM would make the worker abort its current job instead of finishing it.
        """
        if self._terminated:
            return
        self._terminated = True
        with suppress(ProcessLookupError):
            self._process.terminate()

    def stop(self, grace_s: float, is_forced: Callable[[], bool]) -> None:
        """Terminate the process, wait at most `grace_s`, then kill it and its descendants.

        Args:
            is_forced: called while waiting; if it returns True, the process is killed at once.
        """
        self.terminate()
        deadline = time.monotonic() + grace_s
        while self._process.poll() is None and time.monotonic() < deadline and not is_forced():
            time.sleep(_POLL_S)
        with suppress(ProcessLookupError, PermissionError):  # macOS raises EPERM for an empty group
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def last_line(log: Path) -> str:
    """Return the last line that is not blank; "" if the log is empty or missing."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def _relative(path: Path) -> str:
    """Return the path relative to the working directory, if it is below that."""
    with suppress(ValueError):
        return str(path.relative_to(Path.cwd()))
    return str(path)


def marked_processes(mark: str) -> dict[int, str]:
    """Find every live process with `mark` in its environment: command lines by pid."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes()
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue  # it ended meanwhile, or belongs to another user
        if f"{MARK}={mark}".encode() in environment.split(b"\0"):
            found[int(folder.name)] = command
    return found
