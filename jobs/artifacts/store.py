"""Define the store of finished videos and their pictures, and open it as a folder or a bucket.

A key is a relative path. An artifact is visible under its key only once it is complete.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote

from jobs.artifacts.bucket import BucketArtifactStore
from jobs.artifacts.folder import FolderArtifactStore
from jobs.artifacts.keys import StoredArtifact
from jobs.artifacts.s3_url import BucketAddress
from jobs.errors import ArtifactRefused


class ArtifactStore(Protocol):
    """A store of files by key.

    Every method raises ArtifactRefused for a malformed key, and ArtifactsUnavailable if the store
    does not respond.
    """

    def probe(self) -> None:
        """Check that artifacts can be written, before any are made."""

    def put(self, key: str, source: Path, check: Callable[[], None] | None = None) -> None:
        """Copy `source` to `key`, atomically, replacing what was there.

        Transient faults are retried for about half a minute. `check` is called meanwhile; an error
        it raises ends the retries.

        Raises:
            ArtifactNotStored: the artifact could not be stored; the error says why.
            WorkerUnfit: the store is missing, for this process at least.
        """

    def size(self, key: str) -> int | None:
        """Return the artifact's size in bytes; None if there is no artifact."""

    def read(self, key: str, start: int, end: int) -> Iterator[bytes]:
        """Read the bytes from `start` to before `end` in chunks; opens it when iterated."""

    def signed_url(self, key: str, method: str, valid_s: int) -> str | None:
        """Return a URL by which anybody may send this request for so long.

        None if the store has no URLs. Asks the store nothing, so the artifact may be missing.
        """

    def delete(self, key: str) -> None:
        """Remove the artifact, if there is one."""

    def list(self, prefix: str = "") -> Iterator[StoredArtifact]:
        """List every artifact below `prefix`, in no particular order."""

    def remove_leftovers(self) -> int:
        """Remove what puts left behind that were interrupted a day ago or more; return how many."""


class MarkedStore(ArtifactStore, Protocol):
    """A store as it is found, whichever it is; `jobs/artifacts/known_store.py` tells it apart."""

    def put(
        self,
        key: str,
        source: Path,
        check: Callable[[], None] | None = None,
        guard: Callable[[], None] | None = None,
    ) -> None:
        """Copy `source` to `key` as `ArtifactStore.put` does.

        Args:
            guard: called before each try; a PutFailed that it raises fails that try, before
                anything is written.
        """

    def marker(self) -> bytes | None:
        """Read the store's marker; None if it has none."""

    def write_marker(self, text: bytes, *, replace: bool) -> None:
        """Write the marker, whole or not at all; without `replace`, an existing one is kept."""


def artifact_key(job_id: str, attempt: str) -> str:
    """Return the key of an attempt's video; `attempt` is its label.

    Each attempt has a key of its own, so a stale attempt cannot overwrite a newer one's video.
    """
    return f"videos/{job_id}/{attempt}.mp4"


def thumbnail_key(job_id: str, attempt: str) -> str:
    """Return the key of the thumbnail of an attempt's video, beside the video's."""
    return f"videos/{job_id}/{attempt}-thumbnail.webp"


def spritesheet_key(job_id: str, attempt: str) -> str:
    """Return the key of the spritesheet of an attempt's video, beside the video's."""
    return f"videos/{job_id}/{attempt}-spritesheet.webp"


def open_artifacts(url: str) -> MarkedStore:
    """Open the store at `url`: `file:///…`, or `s3://bucket/prefix?endpoint=…&region=…`.

    No request is sent to a bucket; `probe` does that.

    Raises:
        ArtifactRefused: the URL is malformed, or the folder cannot be created; the error says what
            to write instead.
    """
    if url.startswith("s3://"):
        return BucketArtifactStore(BucketAddress.parse(url))
    folder = unquote(url.removeprefix("file://"))
    if not url.startswith("file:///"):
        raise ArtifactRefused(
            f"ARTIFACTS_URL is {url!r}, which is neither a folder's nor a bucket's address. Write "
            f"it as file:///absolute/folder or s3://bucket/prefix."
        )
    try:
        return FolderArtifactStore(Path(folder))
    except (OSError, ValueError) as error:
        raise ArtifactRefused(f"ARTIFACTS_URL {url!r} cannot be used: {error}.") from error
