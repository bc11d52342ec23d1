"""A folder for unfinished videos, which does not outlive its worker for long.

A worker that is killed cannot clean up behind itself, so the next one does: it removes the folders
whose owner is gone. The owner holds a lock on a file in its folder, which the system lets go of
however it ends.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

logger = logging.getLogger(__name__)

PREFIX: Final = "wan-worker-"
LOCK: Final = "in-use"

UNLOCKED_S: Final = 24 * 3600.0
"""A folder without a lock is removed when nobody has touched it for this long."""


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder of this worker's own, after a sweep of those that others left behind."""
    parent = Path(tempfile.gettempdir())
    sweep(parent)
    # It gets its name when it is locked: no sweep meets one that is about to be.
    unnamed = Path(tempfile.mkdtemp(prefix=f".{PREFIX}", dir=parent))
    with (unnamed / LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        folder = unnamed.rename(parent / unnamed.name.removeprefix("."))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def sweep(parent: Path) -> int:
    """Remove the scratch folders below `parent` whose owner is gone; returns how many."""
    removed = 0
    for folder in (*parent.glob(f"{PREFIX}*"), *parent.glob(f".{PREFIX}*")):
        # Somebody else's, already gone, or not what its name says: not ours to touch.
        with suppress(OSError):
            if _is_abandoned(folder):
                shutil.rmtree(folder)
                removed += 1
    if removed:
        logger.info("removed %d folders that killed workers had left behind", removed)
    return removed


def _is_abandoned(folder: Path) -> bool:
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        return False
    untouched = time.time() - found.st_mtime > UNLOCKED_S
    if folder.name.startswith("."):
        return untouched
    try:
        with (folder / LOCK).open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    except FileNotFoundError:
        return untouched
    except BlockingIOError:
        return False
