"""Make a folder of files atomically: it appears complete and on disk, or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from quant.errors import WeightsError


def check_new_folder(out: Path) -> None:
    """Refuse a folder that exists, or whose parent does not, before work is spent on it.

    Raises:
        WeightsError: names the folder.
    """
    if out.exists():
        raise WeightsError(f"{out} exists already: remove it first, or name another folder")
    if not out.absolute().parent.is_dir():
        raise WeightsError(f"folder {out.parent} for {out.name} does not exist: create it first")


def check_room(out: Path, needed_bytes: int) -> None:
    """Refuse a folder whose disk lacks room for `needed_bytes`.

    Raises:
        WeightsError: names both sizes.
    """
    free = shutil.disk_usage(out.absolute().parent).free
    if needed_bytes > free:
        raise WeightsError(
            f"{out} needs {needed_bytes:,} bytes, and {out.absolute().parent} has {free:,} free: "
            "make room there, or name another folder"
        )


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield a hidden folder beside `out` to write into; it becomes `out` at the end of the block.

    Files in it must be synced by whoever writes them. After any error or signal it is removed.

    Raises:
        OSError: something has been created at `out` meanwhile, or the folder cannot be made.
    """
    # The folder's name is chosen before it is created: a signal that arrives right after `mkdir`
    # then still finds the folder to remove.
    folder = out.absolute().parent / f".{out.name}.{secrets.token_hex(4)}"
    try:
        folder.mkdir(0o755)
        yield folder
        sync(folder)
        folder.rename(out)  # fails if something has been created there meanwhile
        sync(out.absolute().parent)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def sync(path: Path) -> None:
    """Wait until a file or the entries of a folder are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
