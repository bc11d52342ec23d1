"""Where finished videos lie: files addressed by keys, in a folder or in a bucket.

A key is a relative path. An artifact is visible under its key only when it is whole.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote

from jobs.artifacts.bucket import BucketArtifactStore
from jobs.artifacts.folder import FolderArtifactStore
from jobs.artifacts.keys import Stored
from jobs.artifacts.s3_url import BucketAddress
from jobs.errors import ArtifactRefused


class ArtifactStore(Protocol):
    """Both kinds refuse malformed keys with ArtifactRefused, and raise ArtifactsUnavailable when
    the store does not answer."""

    def probe(self) -> None:
        """Make sure that artifacts can be written, before work is done for them."""

    def put(self, key: str, source: Path, check: Callable[[], None] | None = None) -> None:
        """Copy `source` to `key`, atomically, replacing what was there.

        Faults that may pass are waited for, for about half a minute; `check` is called meanwhile,
        and what it raises ends the waiting.

        Raises:
            ArtifactNotStored: the store does not take it; the sentence says why.
        """

    def size(self, key: str) -> int | None:
        """Return the artifact's bytes, or None if there is no artifact."""

    def read(self, key: str, start: int, end: int) -> Iterator[bytes]:
        """Read the bytes from `start` to before `end`, in chunks; nothing is opened until then."""

    def delete(self, key: str) -> None:
        """Remove the artifact, if there is one."""

    def list(self, prefix: str = "") -> Iterator[Stored]:
        """Name every artifact below `prefix`, in no order."""

    def remove_leftovers(self) -> int:
        """Remove what interrupted puts left behind, a day later; return how many."""


def artifact_key(job_id: str, attempt: str) -> str:
    """Name the video of one attempt, by its label: a stale one cannot overwrite a newer."""
    return f"videos/{job_id}/{attempt}.mp4"


def open_artifacts(url: str) -> ArtifactStore:
    """Open the store at `url`: `file:///…`, or `s3://bucket/prefix?endpoint=…&region=…`.

    A bucket is not asked until the first use; `probe` does that.

    Raises:
        ArtifactRefused: not such an address, or a folder that cannot be made; the sentence says
            what to write instead.
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
