"""Pack what a run has found, so that it can leave a machine that is given back, and unpack it."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path


def packed(folder: Path, files: Iterable[Path]) -> bytes:
    """Return files below a folder as a tar, compressed by xz."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:xz") as tar:
        for file in files:
            tar.add(file, str(file.relative_to(folder)))
    return data.getvalue()


def unpack(archive: Path, folder: Path) -> None:
    """Write an archive's files below a folder."""
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
