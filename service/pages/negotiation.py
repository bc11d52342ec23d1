"""Choose between the forms of an answer by what the caller accepts (RFC 9110, section 12.5).

An answer that depends on such a choice must name the header in Vary, or a cache would give the
form that one caller wanted to all others.
"""

import re
from collections.abc import Iterator
from typing import Final

VARY_BY_ACCEPT: Final = {"Vary": "Accept"}
"""The header of every answer, error or not, that was chosen with `prefers_html`."""

# Commas and semicolons within quotes separate nothing.
_MEMBER: Final = re.compile(r'(?:[^,"]|"(?:\\.|[^"\\])*"?)+', re.DOTALL)
_PARAMETER: Final = re.compile(r'(?:[^;"]|"(?:\\.|[^"\\])*"?)+', re.DOTALL)
_QUALITY: Final = re.compile(r"0(?:\.[0-9]{0,3})?|1(?:\.0{0,3})?")

_HTML: Final = ("text", "html", frozenset({"charset=utf-8"}))
_JSON: Final = ("application", "json", frozenset[str]())


def prefers_html(accept: str) -> bool:
    """Return whether a caller would rather have a page than JSON.

    Browsers would. Callers that name neither, or take both alike (`*/*`, or no header at all), are
    programs and get JSON.

    Args:
        accept: the Accept header; several are joined with commas, none is "".
    """
    return _media_quality(accept, _HTML) > _media_quality(accept, _JSON)


def accepts_gzip(accept_encoding: str) -> bool:
    """Return whether an answer may be gzipped, and the caller does not want it otherwise.

    Args:
        accept_encoding: the Accept-Encoding header; several are joined with commas, none is "".
    """
    qualities = {coding: quality for coding, _, quality in _members(accept_encoding)}
    gzip = qualities.get("gzip", qualities.get("x-gzip", qualities.get("*", 0.0)))
    return gzip > 0 and gzip >= qualities.get("identity", 0.0)


def _media_quality(accept: str, wanted: tuple[str, str, frozenset[str]]) -> float:
    """Return the quality of a media type: that of the most specific range that covers it, or 0."""
    kind, subtype, parameters = wanted
    covering = ("*/*", f"{kind}/*", f"{kind}/{subtype}")  # from the least to the most specific
    best, quality = (-1, 0), 0.0
    for media_range, asked, its_quality in _members(accept):
        if media_range not in covering or not asked <= parameters:
            continue
        rank = (covering.index(media_range), len(asked))
        if rank > best:
            best, quality = rank, its_quality
    return quality


def _members(header: str) -> Iterator[tuple[str, frozenset[str], float]]:
    """Split a header into its members: what each names, its parameters, and its quality.

    A member whose quality cannot be read is left out.
    """
    for member in _MEMBER.findall(header):
        parts = [part.strip().lower() for part in _PARAMETER.findall(member)]
        parameters, quality = set(), "1"
        for parameter in parts[1:]:
            name, _, value = (text.strip() for text in parameter.partition("="))
            if name == "q":
                quality = value
                break  # what follows are extensions, which RFC 9110 tells to ignore
            parameters.add(name + "=" + value.strip('"'))
        if parts and _QUALITY.fullmatch(quality):
            yield parts[0], frozenset(parameters), float(quality)
