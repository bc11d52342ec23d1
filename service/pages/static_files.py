"""Serve the files of the web pages, all of which come with the package.

Their links, `static/VERSION/NAME`, hold a digest of all files together. So a browser may keep a
file for a year, and relative links between files lead to files of the same version. A process of
another release also answers such a link, with its own file, which is then not kept.
"""

import gzip
import hashlib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import PurePosixPath
from typing import Final, Self

from fastapi import APIRouter, Request
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import Response

from service.pages.negotiation import accepts_gzip

router = APIRouter(include_in_schema=False)

MEDIA_TYPES: Final = {
    ".css": "text/css; charset=utf-8",
    ".ico": "image/x-icon",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
}
"""The media types of what is served, by the end of its name; other files are not served."""

KEEP_FOR_A_YEAR: Final = "public, max-age=31536000, immutable"
KEEP_FOR_A_DAY: Final = "public, max-age=86400"
ASK_EACH_TIME: Final = "no-cache"


@dataclass(frozen=True, slots=True)
class StaticFile:
    """A file as it is sent.

    Attributes:
        gzipped: the same content in fewer bytes; None where gzip does not help.
        digest: SHA-256 of the content, in hexadecimal.
    """

    media_type: str
    content: bytes
    gzipped: bytes | None
    digest: str

    @classmethod
    def of(cls, content: bytes, media_type: str, gzipped: bytes | None = None) -> Self:
        """Make a file of its content, and gzip it unless that was done before."""
        gzipped = gzip.compress(content, mtime=0) if gzipped is None else gzipped
        smaller = gzipped if len(gzipped) < len(content) else None
        return cls(media_type, content, smaller, hashlib.sha256(content).hexdigest())


@dataclass(frozen=True, slots=True)
class StaticFiles:
    """All files by their names below `static/`, and the version that they make together."""

    by_name: dict[str, StaticFile]
    version: str

    @property
    def base(self) -> str:
        """What links to files begin with; relative, because a proxy may add a prefix."""
        return f"static/{self.version}"


@cache
def static_files() -> StaticFiles:
    """Read the files; the first request does, and they stay in memory."""
    found = dict(sorted(_read(files("service.pages").joinpath("static"))))
    digests = "".join(f"{name} {file.digest}\n" for name, file in found.items())
    return StaticFiles(found, hashlib.sha256(digests.encode()).hexdigest()[:16])


def send(file: StaticFile, request: Request, cache_control: str) -> Response:
    """Answer with a file, or with 304 if the caller has it."""
    accept_encoding = ",".join(request.headers.getlist("accept-encoding"))
    gzipped = file.gzipped if accepts_gzip(accept_encoding) else None
    etag = f'"{file.digest[:32]}{"" if gzipped is None else "-gzip"}"'
    # A 304 has the type, too: the policy that `service/middleware/security_headers.py` adds depends
    # on it, and browsers replace the headers that they have kept by those of a 304.
    headers = {"etag": etag, "cache-control": cache_control, "content-type": file.media_type}
    if file.gzipped is not None:
        headers["vary"] = "Accept-Encoding"
    if _has(etag, request.headers):
        return Response(status_code=304, headers=headers)
    body = file.content if gzipped is None else gzipped
    if gzipped is not None:
        headers["content-encoding"] = "gzip"
    headers["content-length"] = str(len(body))
    return Response(b"" if request.method == "HEAD" else body, headers=headers)


@router.api_route("/static/{version}/{name:path}", methods=["GET", "HEAD"])
async def get_static(version: str, name: str, request: Request) -> Response:
    """Answer with one of the pages' files."""
    found = static_files()
    file = found.by_name.get(name)
    if file is None:
        raise HTTPException(404, "The pages have no file of this name.")
    known = version == found.version
    return send(file, request, KEEP_FOR_A_YEAR if known else ASK_EACH_TIME)


@router.api_route("/favicon.ico", methods=["GET", "HEAD"])
async def favicon_ico(request: Request) -> Response:
    """Answer with the icon at the place where browsers look for it unasked."""
    return send(static_files().by_name["favicon.ico"], request, KEEP_FOR_A_DAY)


@router.api_route("/favicon.svg", methods=["GET", "HEAD"])
async def favicon_svg(request: Request) -> Response:
    """Answer with the icon in any size."""
    return send(static_files().by_name["favicon.svg"], request, KEEP_FOR_A_DAY)


def _read(folder: Traversable, prefix: str = "") -> list[tuple[str, StaticFile]]:
    """Read a folder and those below. What is too large for the repository is kept gzipped there."""
    found: list[tuple[str, StaticFile]] = []
    for entry in folder.iterdir():
        if entry.is_dir():
            found += _read(entry, f"{prefix}{entry.name}/")
            continue
        name = entry.name.removesuffix(".gz")
        media_type = MEDIA_TYPES.get(PurePosixPath(name).suffix)
        if media_type is None:
            continue
        stored = entry.read_bytes()
        if name == entry.name:
            file = StaticFile.of(stored, media_type)
        else:
            file = StaticFile.of(gzip.decompress(stored), media_type, stored)
        found.append((prefix + name, file))
    return found


def _has(etag: str, headers: Headers) -> bool:
    """Return whether a caller has the content already, by its If-None-Match."""
    tags = ",".join(headers.getlist("if-none-match")).split(",")
    return bool({tag.strip().removeprefix("W/") for tag in tags} & {etag, "*"})
