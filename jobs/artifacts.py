"""Where finished videos lie: a folder, addressed by keys.

A key is a relative path. A file is visible under its key only when it is whole, because it is
written beside its final place and renamed. Other kinds of store (a bucket) come in as further
classes with the same methods.
"""

import os
import re
import shutil
import tempfile
from pathlib import Path
from urllib.parse import unquote, urlsplit

from jobs.errors import ArtifactRefused

_KEY = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*")


def artifact_key(job_id: str, attempt: int) -> str:
    """Name the video of one attempt, by its number: a stale one cannot overwrite a newer."""
    return f"videos/{job_id}/{attempt}.mp4"


class FolderArtifactStore:
    """Artifacts as files below `root`, which is created if it is missing."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self.root.mkdir(parents=True, exist_ok=True)

    def path(self, key: str) -> Path:
        """Return where `key` lies, whether or not there is a file.

        Raises:
            ArtifactRefused: the key is malformed or leads out of the root (through `..`, or a
                link).
        """
        if not _KEY.fullmatch(key):
            raise ArtifactRefused(
                f"The artifact key {key[:100]!r} is refused: a key is made of names of letters, "
                f"digits, '.', '_' and '-', joined by '/', and no name starts with a dot."
            )
        path = (self.root / key).resolve()
        if not path.is_relative_to(self.root):
            raise ArtifactRefused(f"The artifact key {key!r} leads out of the artifact folder.")
        return path

    def put(self, key: str, source: Path) -> Path:
        """Copy `source` to `key`, atomically and durably, replacing what was there."""
        target = self.path(key)
        target.parent.mkdir(parents=True, exist_ok=True)
        # In the target's own folder: a rename is atomic only within one file system.
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=".incoming-")
        incoming = Path(name)
        try:
            with os.fdopen(handle, "wb") as out, source.open("rb") as data:
                shutil.copyfileobj(data, out, 1024 * 1024)
                out.flush()
                os.fsync(out.fileno())
            incoming.chmod(0o644)
            incoming.replace(target)
        except BaseException:
            incoming.unlink(missing_ok=True)
            raise
        _sync_folder(target.parent)
        return target

    def delete(self, key: str) -> None:
        """Remove the file under `key`, if there is one.

        Its folder stays: another attempt may be about to put a file there.
        """
        self.path(key).unlink(missing_ok=True)


def open_artifacts(url: str) -> FolderArtifactStore:
    """Open the artifact store at `url`, a `file:///…` address of an absolute folder.

    Raises:
        ArtifactRefused: another scheme, a host, or a relative path; the sentence says what to
            write instead.
    """
    parts = urlsplit(url)
    if parts.scheme != "file" or parts.netloc or not parts.path.startswith("/"):
        raise ArtifactRefused(
            f"ARTIFACTS_URL is {url!r}, which is not a folder's address. Write it as file:///absolute/folder."
        )
    return FolderArtifactStore(Path(unquote(parts.path)))


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
