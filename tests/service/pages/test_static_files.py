"""Test how the files of the pages are served: to whom, in which form, and for how long."""

import gzip
import hashlib
from io import BytesIO
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from PIL import Image

from service.pages.static_files import MEDIA_TYPES, StaticFile, static_files
from tests.service.conftest import MakeKey

FOLDER = Path(__file__).resolve().parents[3] / "service" / "pages" / "static"
BUNDLE = "vendor/swagger-ui-5.35.0/swagger-ui-bundle.js"


def test_every_file_with_a_media_type_is_served() -> None:
    found = {path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*") if path.is_file()}
    served = {name.removesuffix(".gz") for name in found}
    served = {name for name in served if Path(name).suffix in MEDIA_TYPES}
    assert set(static_files().by_name) == served
    assert {BUNDLE, "docs/docs.js", "docs/docs.css", "favicon.ico"} <= served
    assert not [name for name in served if name.endswith("README.md")]


@pytest.mark.parametrize("name", sorted(static_files().by_name))
def test_a_file_is_sent_with_what_a_browser_needs(client: TestClient, name: str) -> None:
    file = static_files().by_name[name]
    url = f"/{static_files().base}/{name}"
    plain = client.get(url, headers={"Accept-Encoding": "identity"})
    assert plain.status_code == 200
    assert hashlib.sha256(plain.content).hexdigest() == file.digest
    assert "content-encoding" not in plain.headers
    gzipped = client.get(url, headers={"Accept-Encoding": "gzip, br"})
    assert gzipped.content == plain.content  # the client unpacks it
    for answer in (plain, gzipped):
        assert answer.headers["content-type"] == MEDIA_TYPES[Path(name).suffix]
        assert answer.headers["cache-control"] == "public, max-age=31536000, immutable"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["content-security-policy"].startswith("default-src 'none'")
        assert answer.headers.get("vary") == (None if file.gzipped is None else "Accept-Encoding")
    if file.gzipped is not None:
        assert gzipped.headers["content-encoding"] == "gzip"
        assert int(gzipped.headers["content-length"]) == len(file.gzipped) < len(plain.content)
        assert gzipped.headers["etag"] != plain.headers["etag"]


def test_large_files_travel_gzipped(client: TestClient) -> None:
    url = f"/{static_files().base}/{BUNDLE}"
    answer = client.get(url, headers={"Accept-Encoding": "gzip"})
    assert int(answer.headers["content-length"]) < 500_000
    assert len(answer.content) > 1_700_000


@pytest.mark.parametrize("encoding", ["gzip", "identity"])
@pytest.mark.parametrize("path", [f"/{static_files().base}/docs/docs.js", "/favicon.ico", "/docs"])
def test_what_a_browser_has_is_not_sent_again(client: TestClient, path: str, encoding: str) -> None:
    headers = {"Accept-Encoding": encoding}
    first = client.get(path, headers=headers)
    etag = first.headers["etag"]
    for tags in (etag, f"W/{etag}", f'"other", {etag}', "*"):
        again = client.get(path, headers=headers | {"If-None-Match": tags})
        assert (again.status_code, again.content) == (304, b"")
        # A browser replaces the headers that it has kept by these.
        for name in ("etag", "cache-control", "vary", "content-security-policy"):
            assert again.headers.get(name) == first.headers.get(name), name
    other = client.get(path, headers=headers | {"If-None-Match": '"other"'})
    assert (other.status_code, other.content) == (200, first.content)


@pytest.mark.parametrize("path", [f"/{static_files().base}/docs/docs.js", "/favicon.svg", "/docs"])
def test_head_has_the_headers_only(client: TestClient, path: str) -> None:
    got, head = client.get(path), client.head(path)
    assert (head.status_code, head.content) == (200, b"")
    ignored = {"x-request-id"}
    assert {k: v for k, v in head.headers.items() if k not in ignored} == {
        k: v for k, v in got.headers.items() if k not in ignored
    }


def test_a_link_of_another_release_is_answered_but_not_kept(client: TestClient) -> None:
    answer = client.get("/static/0123456789abcdef/docs/docs.js")
    assert answer.text == (FOLDER / "docs/docs.js").read_text(encoding="utf-8")
    assert answer.headers["cache-control"] == "no-cache"


def test_the_version_changes_with_any_file() -> None:
    files = dict(static_files().by_name)
    digests = "".join(f"{name} {file.digest}\n" for name, file in files.items())
    assert static_files().version == hashlib.sha256(digests.encode()).hexdigest()[:16]


@pytest.mark.parametrize(
    "name",
    [
        *("", "nothing.js", "vendor", "vendor/README.md", "vendor/swagger-ui-5.35.0/SHA256SUMS"),
        *(f"{BUNDLE}.gz", "../static_files.py", "%2e%2e/static_files.py", "..%2Fapi_docs.py"),
        *("/etc/passwd", "docs/docs.js/", "./docs/docs.js%00", "docs/DOCS.JS"),
    ],
)
def test_nothing_else_is_served(client: TestClient, name: str) -> None:
    answer = client.get(f"/{static_files().base}/{name}")
    assert answer.status_code == 404
    assert answer.headers["content-type"] == "application/problem+json"


def test_other_methods_are_refused(client: TestClient) -> None:
    answer = client.put(f"/{static_files().base}/docs/docs.js")
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET, HEAD")


def test_files_need_no_key(client: TestClient, make_key: MakeKey) -> None:
    make_key("alice")
    assert client.get(f"/{static_files().base}/docs/docs.js").status_code == 200


def test_a_file_that_gzip_would_enlarge_is_sent_as_it_is() -> None:
    assert StaticFile.of(b"short", "text/plain").gzipped is None
    long = StaticFile.of(b"long " * 100, "text/plain")
    assert long.gzipped is not None
    assert gzip.decompress(long.gzipped) == long.content


def test_the_icon_is_an_icon_in_two_sizes_and_a_drawing(client: TestClient) -> None:
    icon = client.get("/favicon.ico")
    assert icon.headers["content-type"] == "image/x-icon"
    assert icon.headers["cache-control"] == "public, max-age=86400"
    image = Image.open(BytesIO(icon.content))
    assert image.info["sizes"] == {(16, 16), (32, 32)}
    drawing = client.get("/favicon.svg")
    assert drawing.headers["content-type"] == "image/svg+xml"
    assert "<style" not in drawing.text  # its policy would block it
    assert "style=" not in drawing.text
