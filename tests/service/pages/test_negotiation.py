"""Test which form of an answer callers get, by the headers that browsers and programs send."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.pages.negotiation import accepts_gzip, prefers_html

CHROMIUM = (
    "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,image/apng,*/*;"
    "q=0.8,application/signed-exchange;v=b3;q=0.7"
)
FIREFOX = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"


@pytest.mark.parametrize(
    "accept",
    [
        *(CHROMIUM, FIREFOX, "text/html", "TEXT/HTML", " text/html ; q=1.000 ", "text/*"),
        *("text/html;charset=utf-8", 'text/html; charset="UTF-8"', "text/html;q=0.001"),
        *("application/json;q=0.9, text/html", "*/*;q=0.5, text/html;q=0.6"),
        *("*/*, application/json;q=0.9", ",, text/html ,", "application/*;q=0.1, text/*;q=0.2"),
        *(
            "text/html;level=1;q=0.1, text/html",
            "text/html;q=1;application/json",
            "image/png,text/*",
        ),
        *('a/b;note="x, application/json;q=1", text/html;q=0.5', "application/json;q=0, */*"),
    ],
)
def test_browsers_prefer_a_page(accept: str) -> None:
    assert prefers_html(accept)


@pytest.mark.parametrize(
    "accept",
    [
        *(
            "",
            "*/*",
            "application/json",
            "application/*",
            "image/png",
            "text/plain",
            "text/html;q=0",
        ),
        *("text/html, application/json", "text/html, */*", "application/json, text/plain, */*"),
        *("text/html;q=0.5, */*", "text/html;q=0.8, application/json;q=0.8", "*/*, text/html;q=0"),
        *("text/html;level=1", "text/html;charset=latin-1", "text/html;q=2", "text/html;q=high"),
        *("text/html;q=0.1234", "text/html;q=-1", "texts/html", "text/htm", "html", ";", ",", '"'),
        *('a/b;note="x, text/html;q=1"', 'a/b;note="text/html, text/html', "text/*;q=0.9, */*;q=1"),
    ],
)
def test_programs_get_json(accept: str) -> None:
    assert not prefers_html(accept)


@pytest.mark.parametrize(
    "header",
    [
        "gzip",
        "gzip, deflate, br, zstd",
        "*",
        "GZIP;q=0.5",
        "x-gzip",
        "br, gzip;q=0.1, identity;q=0",
    ],
)
def test_gzip_is_taken(header: str) -> None:
    assert accepts_gzip(header)


@pytest.mark.parametrize(
    "header",
    ["", "identity", "br", "gzip;q=0", "*;q=0", "gzip;q=0, *", "gzip;q=0.5, identity", "gzip;q=x"],
)
def test_gzip_is_not_taken(header: str) -> None:
    assert not accepts_gzip(header)


@given(st.text(alphabet='texhmlapiconjs/*;,=q.0159" \\', max_size=60))
def test_any_header_can_be_read(header: str) -> None:
    assert prefers_html(header) in (True, False)
    assert accepts_gzip(header) in (True, False)
