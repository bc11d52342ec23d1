"""Provide a temporary folder for unfinished videos, and remove those of killed workers.

A killed worker cannot remove its folder, so the next worker that starts does. The owner of a folder
holds a lock on a file in it; the kernel releases the lock however the owner ends. A folder without
a held lock is abandoned.
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
"""A folder without a lock file is removed when it was not modified for this long."""


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Create a folder for this worker, after removing abandoned ones."""
    parent = Path(tempfile.gettempdir())
    parent.mkdir(parents=True, exist_ok=True)  # a cleaner may have removed it
    remove_abandoned(parent)
    # It is renamed once it is locked, so that no other worker finds it unlocked and removes it.
    unnamed = Path(tempfile.mkdtemp(prefix=f".{PREFIX}", dir=parent))
    with (unnamed / LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        folder = unnamed.rename(parent / unnamed.name.removeprefix("."))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def remove_abandoned(parent: Path) -> int:
    """Remove the scratch folders in `parent` whose owner has ended; return how many."""
    removed = 0
    for folder in (*parent.glob(f"{PREFIX}*"), *parent.glob(f".{PREFIX}*")):
        # OSError: another user's folder, one already removed, or not a scratch folder at all.
        with suppress(OSError):
            if _is_abandoned(folder):
                shutil.rmtree(folder)
                removed += 1
    if removed:
        logger.info("removed %d folders that killed workers had left behind", removed)
    return removed


def _is_abandoned(folder: Path) -> bool:
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        return False
    untouched = time.time() - status.st_mtime > UNLOCKED_S
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
