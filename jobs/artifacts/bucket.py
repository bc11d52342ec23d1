"""Store artifacts in an S3-compatible bucket.

S3 shows an object only once it is complete, so an interrupted upload leaves nothing visible. Files
up to `_SINGLE_PUT` bytes are sent in one request, which leaves nothing at all.
"""

import logging
import mimetypes
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Literal, cast
from urllib.parse import urlsplit

import obstore
from obstore import exceptions
from obstore.store import S3Store

from jobs.artifacts.keys import MARKER, StoredArtifact, checked_key, is_key
from jobs.artifacts.retry import RETRY_FOR_S, PutFailed, put_with_retries
from jobs.artifacts.s3_url import BucketAddress
from jobs.errors import ArtifactRefused, ArtifactsUnavailable

logger = logging.getLogger(__name__)

_SINGLE_PUT = 16 * 1024 * 1024
_CHUNK = 1024 * 1024
_PROBE = "probe"
# Without credentials in the environment, the client asks the cloud's metadata service at this path.
_METADATA = "/latest/api/token"

# Few retries, for reads. Puts are retried for longer by `put_with_retries`, which can be cancelled
# between tries.
_RETRIES = 2
_RETRY_TIMEOUT = timedelta(seconds=10)
_REQUEST_TIMEOUT = timedelta(seconds=30)

_REFUSED = (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError)
# A missing object, or bucket, is a FileNotFoundError.
_FAULTS = (exceptions.BaseError, OSError)


class BucketArtifactStore:
    """Artifacts as objects below the address' prefix. Credentials come from AWS_* variables.

    `ArtifactStore` describes the methods. Creating one sends no request to the bucket.

    Raises:
        ArtifactRefused: those variables contradict each other.
    """

    def __init__(self, address: BucketAddress, retry_for_s: float = RETRY_FOR_S) -> None:
        self._name = address.bucket
        try:
            self._bucket = _open(address)
        except exceptions.BaseError as error:
            raise ArtifactRefused(
                f"The bucket {self._name} cannot be opened: {_first_line(error)}. Check "
                f"ARTIFACTS_URL and the AWS_* variables."
            ) from error
        self._retry_for_s = retry_for_s

    def probe(self) -> None:
        try:
            obstore.put(self._bucket, _PROBE, b"")
            next(iter(obstore.list(self._bucket, chunk_size=1)), None)
            obstore.delete(self._bucket, _PROBE)
        except _FAULTS as error:
            raise ArtifactsUnavailable(
                f"The bucket {self._name} cannot be used: {_reason(error)}. Check ARTIFACTS_URL "
                f"and the AWS_* variables. It said: {_first_line(error)}"
            ) from error

    def put(
        self,
        key: str,
        source: Path,
        check: Callable[[], None] | None = None,
        guard: Callable[[], None] | None = None,
    ) -> None:
        checked_key(key)
        source.stat()  # a missing source is not the bucket's fault
        put_with_retries(lambda: self._put_once(key, source), check, guard, self._retry_for_s)

    def size(self, key: str) -> int | None:
        try:
            return obstore.head(self._bucket, checked_key(key))["size"]
        except FileNotFoundError:
            return None
        except _FAULTS as error:
            raise _unavailable(error) from error

    def read(self, key: str, start: int, end: int) -> Iterator[bytes]:
        # One request for each chunk: a slow reader holds no connection open, and a fault half way
        # only repeats one chunk.
        checked_key(key)
        try:
            for first in range(start, end, _CHUNK):
                last = min(first + _CHUNK, end)
                yield obstore.get_range(self._bucket, key, start=first, end=last).to_bytes()
        except _FAULTS as error:
            raise _unavailable(error) from error

    def signed_url(self, key: str, method: str, valid_s: int) -> str | None:
        signed_method = cast("Literal['GET', 'HEAD']", method)
        try:
            return obstore.sign(
                self._bucket, signed_method, checked_key(key), timedelta(seconds=valid_s)
            )
        except _FAULTS as error:
            raise _unavailable(error) from error

    def delete(self, key: str) -> None:
        try:
            obstore.delete(self._bucket, checked_key(key))
        except FileNotFoundError:
            pass
        except _FAULTS as error:
            raise _unavailable(error) from error

    def list(self, prefix: str = "") -> Iterator[StoredArtifact]:
        folder = checked_key(prefix) if prefix else None
        try:
            for page in obstore.list(self._bucket, folder, chunk_size=1000):
                for found in page:
                    if is_key(found["path"]):
                        yield StoredArtifact(found["path"], found["size"], found["last_modified"])
        except _FAULTS as error:
            raise _unavailable(error) from error

    def remove_leftovers(self) -> int:
        """Remove nothing: a lifecycle rule of the bucket removes broken multipart uploads."""
        return 0

    def marker(self) -> bytes | None:
        try:
            return bytes(obstore.get(self._bucket, MARKER).bytes())
        except FileNotFoundError:
            return None
        except _FAULTS as error:
            raise _unavailable(error) from error

    def write_marker(self, text: bytes, *, replace: bool) -> None:
        try:
            if replace or not self._create_marker(text):
                obstore.put(self._bucket, MARKER, text, use_multipart=False)
        except _FAULTS as error:
            raise _unavailable(error) from error

    def _create_marker(self, text: bytes) -> bool:
        """Write the marker if there is none; return False if the bucket cannot do it like that."""
        try:
            obstore.put(self._bucket, MARKER, text, mode="create", use_multipart=False)
        except exceptions.AlreadyExistsError:
            pass
        except exceptions.BaseError:
            # Some compatible stores refuse conditional puts. Two processes at once would then
            # replace each other's marker; the lock in Redis lets only one of them write.
            return False
        return True

    def _put_once(self, key: str, source: Path) -> None:
        kind = mimetypes.guess_type(key, strict=False)[0] or "application/octet-stream"
        try:
            obstore.put(
                self._bucket,
                key,
                source,
                attributes={"Content-Type": kind},
                chunk_size=_SINGLE_PUT,
                max_concurrency=4,
            )
        except _FAULTS as error:
            transient = not isinstance(error, (*_REFUSED, FileNotFoundError))
            raise PutFailed(_reason(error), transient=transient) from error


def signed_origin(url: str) -> str:
    """Return the origin of the signed URLs of a bucket, without asking it or needing its keys.

    Raises:
        ArtifactRefused: the address is malformed.
    """
    anyones = {"access_key_id": "nobody", "secret_access_key": "nobody"}
    bucket = _open(BucketAddress.parse(url), anyones)
    parts = urlsplit(obstore.sign(bucket, "GET", "any", timedelta(seconds=1)))
    return f"{parts.scheme}://{parts.netloc}"


def _open(address: BucketAddress, keys: Mapping[str, str] = MappingProxyType({})) -> S3Store:
    config: dict[str, str | bool] = {
        # Some compatible stores lack the bulk request, and videos are deleted one at a time.
        "disable_bulk_delete": True,
        **keys,
    }
    if address.server is not None:
        # Both names, or AWS_ENDPOINT_URL_S3 in the environment would take precedence.
        config |= {"endpoint": address.server, "aws_endpoint_url_s3": address.server}
    if address.region is not None:
        config["region"] = address.region
    if address.style is not None:
        config["virtual_hosted_style_request"] = address.style == "virtual"
    return S3Store(
        address.bucket,
        prefix=address.prefix or None,
        config=config,  # type: ignore[arg-type]
        client_options={
            "allow_http": (address.server or "").startswith("http://"),
            "timeout": _REQUEST_TIMEOUT,
        },
        retry_config={"max_retries": _RETRIES, "retry_timeout": _RETRY_TIMEOUT},
    )


def _reason(error: Exception) -> str:
    """Describe the error without naming hosts, as the caller may see the text."""
    if isinstance(error, _REFUSED):
        return "the bucket refuses the credentials"
    text = str(error)
    if _METADATA in text:
        return "there are no credentials (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY)"
    if isinstance(error, FileNotFoundError) or "NoSuchBucket" in text:
        return "the bucket does not exist"
    if "507 Insufficient Storage" in text or "StorageFull" in text or "QuotaExceeded" in text:
        return "the disk of the artifact store is full"
    return "the bucket does not answer, or answers with errors"


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _unavailable(error: Exception) -> ArtifactsUnavailable:
    logger.warning("the bucket failed: %s", _first_line(error))
    return ArtifactsUnavailable(f"{_reason(error).capitalize()}; try again in a few seconds.")
