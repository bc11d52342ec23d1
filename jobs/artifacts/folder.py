"""Store artifacts in a folder that the service and the workers share."""

import contextlib
import errno
import io
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from jobs.artifacts.keys import MARKER, StoredArtifact, checked_key, is_key
from jobs.artifacts.retry import RETRY_FOR_S, PutFailed, put_with_retries
from jobs.errors import ArtifactRefused, ArtifactsUnavailable

_INCOMING = ".incoming-"
_LEFTOVER_S = 24 * 3600.0
_CHUNK = 256 * 1024

_NO_ARTIFACT = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
_FULL = {errno.ENOSPC, errno.EDQUOT}
_PERMANENT = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG),
    *(errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ELOOP),
}


class FolderArtifactStore:
    """Artifacts as files below `root`, which is created if it is missing.

    `ArtifactStore` describes the methods. A file is visible under its key only once it is complete,
    because it is written under another name in the same folder and then renamed.
    """

    def __init__(self, root: Path, retry_for_s: float = RETRY_FOR_S) -> None:
        self.root = root.resolve()
        self.root.mkdir(parents=True, exist_ok=True)
        self._retry_for_s = retry_for_s

    def path(self, key: str) -> Path:
        """Return the path for `key`, whether or not the file exists.

        Raises:
            ArtifactRefused: the key is malformed or leads out of the root through a link.
        """
        path = (self.root / checked_key(key)).resolve()
        if not path.is_relative_to(self.root):
            raise ArtifactRefused(f"The artifact key {key!r} leads out of the artifact folder.")
        return path

    def probe(self) -> None:
        try:
            tempfile.TemporaryFile(dir=self.root, prefix=_INCOMING).close()
        except OSError as error:
            raise ArtifactsUnavailable(
                f"Nothing can be written to the artifact folder {self.root}: {error.strerror}. "
                f"Check who owns it and whether its disk is full, or set ARTIFACTS_URL."
            ) from error

    def put(
        self,
        key: str,
        source: Path,
        check: Callable[[], None] | None = None,
        guard: Callable[[], None] | None = None,
    ) -> None:
        target = self.path(key)
        with source.open("rb") as data:
            put_with_retries(lambda: _put_once(target, data), check, guard, self._retry_for_s)

    def size(self, key: str) -> int | None:
        path = self.path(key)
        try:
            found = path.stat()
        except _NO_ARTIFACT:
            return None
        except OSError as error:
            raise _unavailable(error) from error
        return found.st_size if stat.S_ISREG(found.st_mode) else None

    def read(self, key: str, start: int, end: int) -> Iterator[bytes]:
        try:
            with self.path(key).open("rb") as file:
                file.seek(start)
                while start < end:
                    chunk = file.read(min(_CHUNK, end - start))
                    if not chunk:
                        raise ArtifactsUnavailable(f"The artifact {key} ends at byte {start}.")
                    start += len(chunk)
                    yield chunk
        except OSError as error:
            raise _unavailable(error) from error

    def signed_url(self, key: str, method: str, valid_s: int) -> str | None:
        return None

    def delete(self, key: str) -> None:
        try:
            self.path(key).unlink()
        except _NO_ARTIFACT:
            pass
        except OSError as error:
            raise _unavailable(error) from error

    def list(self, prefix: str = "") -> Iterator[StoredArtifact]:
        for path in self._walk(self.path(prefix) if prefix else self.root):
            key = path.relative_to(self.root).as_posix()
            found = _lstat(path)
            if is_key(key) and found is not None and stat.S_ISREG(found.st_mode):
                yield StoredArtifact(
                    key, found.st_size, datetime.fromtimestamp(found.st_mtime, UTC)
                )

    def remove_leftovers(self) -> int:
        """Remove unfinished files and empty folders that were not modified for a day."""
        oldest = time.time() - _LEFTOVER_S
        removed = 0
        for path in self._walk(self.root):
            found = _lstat(path)
            if found is None or found.st_mtime > oldest:
                continue
            # rmdir fails on a folder that is not empty, as intended. A put whose folder was removed
            # between two of its steps is retried and creates it again.
            with contextlib.suppress(OSError):
                if stat.S_ISDIR(found.st_mode):
                    path.rmdir()
                elif path.name.startswith(_INCOMING):
                    path.unlink()
                    removed += 1
        return removed

    def marker(self) -> bytes | None:
        try:
            return (self.root / MARKER).read_bytes()
        except _NO_ARTIFACT:
            return None
        except OSError as error:
            raise _unavailable(error) from error

    def write_marker(self, text: bytes, *, replace: bool) -> None:
        try:
            _write(self.root / MARKER, io.BytesIO(text), replace=replace)
        except OSError as error:
            raise ArtifactsUnavailable(
                f"The marker of the artifact folder cannot be written ({error.strerror}). Check "
                f"who owns the folder and whether its disk is full."
            ) from error

    def _walk(self, folder: Path) -> Iterator[Path]:
        """Iterate over all files and folders below `folder`, contents first; follows no links."""
        for parent, folders, files in os.walk(folder, topdown=False, onerror=_pass_over_missing):
            for name in (*files, *folders):
                yield Path(parent, name)


def _put_once(target: Path, data: BinaryIO) -> None:
    try:
        data.seek(0)
        target.parent.mkdir(parents=True, exist_ok=True)
        _write(target, data)
    except OSError as error:
        if error.errno in _FULL:
            reason = f"the disk of the artifact store is full ({error.strerror})"
        else:
            reason = f"the artifact folder does not take it ({error.strerror})"
        raise PutFailed(reason, transient=error.errno not in _PERMANENT) from error


def _write(target: Path, data: BinaryIO, *, replace: bool = True) -> None:
    """Copy `data` to `target`, atomically and durably; an existing file is replaced or kept."""
    # In the target's own folder: a rename is atomic only within one file system.
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=_INCOMING)
    incoming = Path(name)
    try:
        with os.fdopen(handle, "wb") as out:
            shutil.copyfileobj(data, out, 1024 * 1024)
            out.flush()
            os.fsync(out.fileno())
        incoming.chmod(0o644)
        if replace:
            incoming.replace(target)
        else:
            _name_if_free(incoming, target)
    except BaseException:
        incoming.unlink(missing_ok=True)
        raise
    _sync_folder(target.parent)


def _name_if_free(incoming: Path, target: Path) -> None:
    """Give a complete file its name, unless there is a file of that name already."""
    try:
        target.hardlink_to(incoming)
    except FileExistsError:
        pass
    except OSError:
        # Some shares know no second name for a file. Two processes at once may then replace each
        # other's file; the lock in Redis lets only one of them write.
        if not target.exists():
            incoming.replace(target)
    incoming.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make a rename in this folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _lstat(path: Path) -> os.stat_result | None:
    """Return the status of a file; None if it was removed while the folder was being read."""
    try:
        return path.lstat()
    except FileNotFoundError:
        return None


def _pass_over_missing(error: OSError) -> None:
    """Ignore folders that were removed meanwhile; without this, `os.walk` ignores all errors."""
    if not isinstance(error, _NO_ARTIFACT):
        raise _unavailable(error) from error


def _unavailable(error: OSError) -> ArtifactsUnavailable:
    return ArtifactsUnavailable(
        f"The artifact folder cannot be read ({error.strerror}); try again in a few seconds."
    )
