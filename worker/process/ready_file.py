"""Tell probes on this machine whether this worker offers its model, by a file.

The file is there while the worker is in the catalog, and its writer holds a lock on it. The kernel
releases the lock however the worker ends, so a file that a killed worker left behind says nothing.
Reading it needs neither torch nor Redis.
"""

from __future__ import annotations

import fcntl
import logging
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import IO, Final

from worker.process.scratch import LOCK, PREFIX

logger = logging.getLogger(__name__)

READY: Final = "ready"
"""The file's name in a worker's scratch folder."""

VARIABLE: Final = "WORKER_READY_FILE"


class ReadyFile:
    """The file of one worker. Only the thread of its heartbeat writes it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._held: IO[str] | None = None
        self._failed = False

    def mark(self, worker_id: str) -> None:
        """Say that the worker serves; write the file again if somebody has removed it.

        A file that cannot be written is logged once, and costs no job.
        """
        if self._held is not None and self._path.exists():
            return
        self.clear()
        try:
            # Locked before it has its name, so that no probe finds it without a lock.
            unnamed = self._path.with_name(f".{self._path.name}.{os.getpid()}")
            held = unnamed.open("w", encoding="utf-8")
            fcntl.flock(held, fcntl.LOCK_EX)
            held.write(f"{worker_id}\n")
            held.flush()
            # Whoever probes may be another user, and the worker's umask is for its videos.
            os.fchmod(held.fileno(), 0o644)
            unnamed.rename(self._path)
        except OSError as error:
            if not self._failed:
                self._failed = True
                logger.warning(
                    "probes are not told that the worker serves, because %s cannot be written "
                    "(%s): set %s to a file that it may write",
                    self._path,
                    error,
                    VARIABLE,
                )
            return
        self._held = held

    def clear(self) -> None:
        """Say that the worker does not serve; no error if it said so before."""
        if self._held is None:
            return
        with suppress(OSError):
            self._path.unlink()
        self._held.close()
        self._held = None


def why_not_ready() -> str | None:
    """Look for this machine's worker; return why it does not serve, or None if it does.

    Without `WORKER_READY_FILE` the worker is found by its scratch folder in TMPDIR.
    """
    named = os.environ.get(VARIABLE)
    if named:
        path = Path(named)
    else:
        folders = [each.parent for each in Path(tempfile.gettempdir()).glob(f"{PREFIX}*/{LOCK}")]
        live = [folder for folder in folders if _is_locked(folder / LOCK)]
        if not live:
            return f"no worker runs with a scratch folder in {tempfile.gettempdir()} (TMPDIR)"
        if len(live) > 1:
            return (
                f"{len(live)} workers have their scratch folders in {tempfile.gettempdir()}: give "
                f"each its own {VARIABLE}, and the probe the same"
            )
        path = live[0] / READY
    if _is_locked(path):
        return None
    if path.exists():
        return f"the worker that wrote {path} has ended"
    return f"the worker does not serve, or not yet: there is no {path}"


def _is_locked(path: Path) -> bool:
    try:
        with path.open("r") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
