"""Which addresses may be called: by their form and their host's name.

An address is read once, by one strict pattern, and is never read again: what is checked is what is
connected to. What its host's name stands for is another matter, see `service.webhooks.ip_rules`.
"""

import ipaddress
import re
from dataclasses import dataclass
from typing import Final, Self

from jobs.errors import Violation
from jobs.spec import MAX_URL_CHARS, shown

SCHEME_PORTS: Final = {"https": 443, "http": 80}
ENTRY_BOUND: Final = "a host, like hooks.example.com, *.example.com or hooks.example.com:8443"

_NAME = r"(?:[a-z0-9_-]{1,63}\.)*[a-z0-9_-]{1,63}"
_HOST = rf"{_NAME}|\[[0-9a-f:.]+\]"
# No place for a user, a password or a fragment, and nothing but visible ASCII.
_URL = re.compile(
    rf"(?P<scheme>https?)://(?P<host>{_HOST})(?::(?P<port>[0-9]{{1,5}}))?"
    r"(?P<path>(?:/[!-~]*)?(?:\?[!-~]*)?)",
    re.IGNORECASE | re.ASCII,
)
_ENTRY = re.compile(
    rf"(?P<wild>\*\.)?(?P<host>{_HOST})(?::(?P<port>[0-9]{{1,5}}))?", re.IGNORECASE | re.ASCII
)
# 127.1 or 0x7f000001: what some resolvers take for an address, and others for a name.
_LIKE_ADDRESS = re.compile(r":|(^|\.)([0-9]+|0x[0-9a-f]*)$")


@dataclass(frozen=True, slots=True)
class Target:
    """An address that may be called, in its parts; `path` includes the query."""

    scheme: str
    host: str
    port: int
    path: str

    @property
    def authority(self) -> str:
        """What the Host header says."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == SCHEME_PORTS[self.scheme] else f"{host}:{self.port}"


class TargetRefused(Exception):
    """An address may not be called. The sentence says why, `bound` what would be accepted."""

    def __init__(self, detail: str, bound: str) -> None:
        super().__init__(detail)
        self.bound = bound


@dataclass(frozen=True, slots=True)
class HostRule:
    """One allowed host, or with `wild` all below it; without a port, the scheme's own."""

    host: str
    wild: bool = False
    port: int | None = None

    @classmethod
    def parse(cls, entry: str) -> Self:
        """Read an entry of the list of allowed hosts. Raises ValueError."""
        found = _ENTRY.fullmatch(entry)
        if found is None or not _is_port(found["port"]):
            raise ValueError(f"{entry!r} is not {ENTRY_BOUND}")
        host = _bare(found["host"])
        wild = found["wild"] is not None
        if wild and (is_literal(host) or "." not in host):
            raise ValueError(f"{entry!r} takes in too much; write *. before a domain of your own")
        if _LIKE_ADDRESS.search(host) and not is_literal(host):
            raise ValueError(
                f"{entry!r} is neither a host's name nor an IP address written in full"
            )
        return cls(host, wild, int(found["port"]) if found["port"] else None)

    def allows(self, target: Target) -> bool:
        if target.port != (self.port or SCHEME_PORTS[target.scheme]):
            return False
        return target.host.endswith(f".{self.host}") if self.wild else target.host == self.host


@dataclass(frozen=True, slots=True)
class WebhookRules:
    """What the operators allow; nothing at all by default."""

    hosts: tuple[HostRule, ...] = ()
    http: bool = False
    private: bool = False

    def violation(self, url: str) -> Violation | None:
        """What is wrong with an address, for the caller who sent it."""
        try:
            self.target(url)
        except TargetRefused as error:
            return Violation("webhook_url", shown(url), error.bound, f"webhook_url {error}")
        return None

    def target(self, url: str) -> Target:
        """Take an address apart.

        Raises:
            TargetRefused: it may not be called.
        """
        if not self.hosts:
            raise TargetRefused(
                "cannot be taken: this service calls nobody. Its operators allow hosts with "
                "SERVICE_WEBHOOK_HOSTS.",
                "nothing, while SERVICE_WEBHOOK_HOSTS is not set",
            )
        found = _URL.fullmatch(url) if len(url) <= MAX_URL_CHARS else None
        if found is None or "#" in url or not _is_port(found["port"]):
            bound = (
                "an address like https://hooks.example.com/path, of at most "
                f"{MAX_URL_CHARS} visible ASCII characters, without user, password and fragment"
            )
            raise TargetRefused(f"is not {bound}.", bound)
        scheme = found["scheme"].lower()
        if scheme == "http" and not self.http:
            raise TargetRefused(
                "begins with http://, and this service calls https:// only, unless its operators "
                "set SERVICE_WEBHOOK_HTTP=1.",
                "an https address",
            )
        path = found["path"]
        target = Target(
            scheme,
            _bare(found["host"]),
            int(found["port"] or SCHEME_PORTS[scheme]),
            path if path.startswith("/") else f"/{path}",
        )
        if not any(rule.allows(target) for rule in self.hosts):
            # The list is the operators' own business, so it is not shown.
            raise TargetRefused(
                f"names {target.authority}, which this service may not call. Its operators allow "
                "hosts, and ports other than the usual one, with SERVICE_WEBHOOK_HOSTS.",
                "an address of a host in SERVICE_WEBHOOK_HOSTS",
            )
        return target


def is_literal(host: str) -> bool:
    """Whether a host is an IP address and no name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _bare(host: str) -> str:
    return host.lower().strip("[]")


def _is_port(digits: str | None) -> bool:
    return digits is None or 1 <= int(digits) <= 65535
