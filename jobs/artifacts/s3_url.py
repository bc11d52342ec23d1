"""Parse and check addresses like `s3://bucket/prefix?endpoint=…&region=…&style=…`."""

import re
from dataclasses import dataclass
from typing import Self
from urllib.parse import parse_qsl, unquote, urlsplit

from jobs.artifacts.keys import is_key
from jobs.errors import ArtifactRefused

_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_ENDPOINT = re.compile(r"(https?://(?:[A-Za-z0-9.-]+|\[[0-9a-fA-F:]+\])(?::\d{1,5})?)/?")
_OPTIONS = ("endpoint", "region", "style")
_STYLES = ("path", "virtual")


@dataclass(frozen=True, slots=True)
class BucketAddress:
    """The address of a bucket, which requests name in the path or the host, as `style` says."""

    bucket: str
    prefix: str = ""
    endpoint: str | None = None
    region: str | None = None
    style: str | None = None

    @classmethod
    def parse(cls, url: str) -> Self:
        """Parse an address.

        Raises:
            ArtifactRefused: it is malformed; the error names the part, and what to write instead.
        """
        try:
            parts = urlsplit(url)
        except ValueError:  # an unbalanced bracket
            raise _refused("text", url, "an address") from None
        if "@" in parts.netloc:  # not shown in the error: it may contain a secret
            raise ArtifactRefused(
                "ARTIFACTS_URL holds a user name or a key. Credentials belong into "
                "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; write s3://bucket/prefix."
            )
        if not _BUCKET.fullmatch(parts.netloc):
            raise _refused(
                "bucket", parts.netloc, "3 to 63 lower-case letters, digits, '.' and '-'"
            )
        prefix = unquote(parts.path).strip("/")
        if prefix and not is_key(prefix):
            raise _refused("prefix", prefix, "names of letters, digits, '.', '_', '-', and '/'")
        options = _options(parts.query)
        style = options.get("style")
        if style is not None and style not in _STYLES:
            raise _refused("style", style, " or ".join(_STYLES))
        endpoint = options.get("endpoint")
        found = _ENDPOINT.fullmatch(endpoint or "")
        if endpoint is not None and found is None:
            shown = endpoint.rpartition("@")[2]  # the part before may be a secret, too
            raise _refused("endpoint", shown, "https://host, alone or with a port")
        return cls(parts.netloc, prefix, found and found[1], options.get("region"), style)

    @property
    def server(self) -> str | None:
        """The URL that requests go to; with `style=virtual` its host begins with the bucket."""
        if self.endpoint is None or self.style != "virtual":
            return self.endpoint
        scheme, host = self.endpoint.split("://")
        return f"{scheme}://{self.bucket}.{host}"


def _options(query: str) -> dict[str, str]:
    pairs = parse_qsl(query, keep_blank_values=True)
    options = dict(pairs)
    unknown = options.keys() - set(_OPTIONS)
    if unknown or len(options) != len(pairs) or "" in options.values():
        names = ", ".join(name for name, _ in pairs)
        raise _refused("query", names, f"{', '.join(_OPTIONS)}, each with a value and at most once")
    return options


def _refused(part: str, value: object, bound: str) -> ArtifactRefused:
    return ArtifactRefused(
        f"The {part} of ARTIFACTS_URL is {value!r}, which is not {bound}. Write the address as "
        f"s3://bucket/prefix?endpoint=https://host:port&region=name."
    )
