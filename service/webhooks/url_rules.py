"""Decide which webhook URLs may be called, and which IP addresses their hosts may have.

A URL is parsed once, by one strict pattern, and never parsed again: the checked parts are the parts
that the sender connects to.

A host name on the list of allowed hosts may still resolve into the service's own network. So it is
resolved once, every address it has must be a public one, and the connection goes to one of these
addresses. A DNS answer that changes in between has no effect.
"""

import asyncio
import re
import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Final, Self

from jobs.errors import Violation
from jobs.spec import MAX_URL_CHARS
from jobs.violations import shown

SCHEME_PORTS: Final = {"https": 443, "http": 80}
ENTRY_BOUND: Final = "a host, like hooks.example.com, *.example.com or hooks.example.com:8443"

_NAME = r"(?:[a-z0-9_-]{1,63}\.)*[a-z0-9_-]{1,63}"
_HOST = rf"{_NAME}|\[[0-9a-f:.]+\]"
# Has no place for a user, a password or a fragment, and takes nothing but visible ASCII.
_URL = re.compile(
    rf"(?P<scheme>https?)://(?P<host>{_HOST})(?::(?P<port>[0-9]{{1,5}}))?"
    r"(?P<path>(?:/[!-~]*)?(?:\?[!-~]*)?)",
    re.IGNORECASE | re.ASCII,
)
_ENTRY = re.compile(
    rf"(?P<wildcard>\*\.)?(?P<host>{_HOST})(?::(?P<port>[0-9]{{1,5}}))?", re.IGNORECASE | re.ASCII
)
# 127.1 or 0x7f000001: some resolvers take these for IP addresses, and others for names.
_LIKE_ADDRESS = re.compile(r":|(^|\.)([0-9]+|0x[0-9a-f]*)$")


@dataclass(frozen=True, slots=True)
class Target:
    """The parts of a URL that may be called; `path` includes the query."""

    scheme: str
    host: str
    port: int
    path: str

    @property
    def authority(self) -> str:
        """The value of the Host header: the port is named only if it is not the scheme's."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == SCHEME_PORTS[self.scheme] else f"{host}:{self.port}"


class TargetRefused(Exception):
    """A URL may not be called. The message says why; `bound` says what would be accepted."""

    def __init__(self, detail: str, bound: str) -> None:
        super().__init__(detail)
        self.bound = bound


@dataclass(frozen=True, slots=True)
class HostRule:
    """An allowed host, or with `wildcard` all its subdomains; without a port, the scheme's own."""

    host: str
    wildcard: bool = False
    port: int | None = None

    @classmethod
    def parse(cls, entry: str) -> Self:
        """Parse an entry of the list of allowed hosts. Raises ValueError."""
        found = _ENTRY.fullmatch(entry)
        if found is None or not _is_port(found["port"]):
            raise ValueError(f"{entry!r} is not {ENTRY_BOUND}")
        host = _normalize_host(found["host"])
        wildcard = found["wildcard"] is not None
        if wildcard and (is_literal(host) or "." not in host):
            raise ValueError(f"{entry!r} takes in too much; write *. before a domain of your own")
        if _LIKE_ADDRESS.search(host) and not is_literal(host):
            raise ValueError(
                f"{entry!r} is neither a host's name nor an IP address written in full"
            )
        return cls(host, wildcard, int(found["port"]) if found["port"] else None)

    def allows(self, target: Target) -> bool:
        """Return whether the rule allows calls to the target's host and port."""
        if target.port != (self.port or SCHEME_PORTS[target.scheme]):
            return False
        if self.wildcard:
            return target.host.endswith(f".{self.host}")
        return target.host == self.host


@dataclass(frozen=True, slots=True)
class WebhookRules:
    """The rules of the operators; by default no URL may be called.

    Attributes:
        hosts: the hosts that may be called.
        http: whether http:// URLs are accepted, too.
        private: whether hosts may have addresses of internal networks and of this machine.
    """

    hosts: tuple[HostRule, ...] = ()
    http: bool = False
    private: bool = False

    def violation(self, url: str) -> Violation | None:
        """Describe what is wrong with a URL, for the caller who sent it; None if nothing is."""
        try:
            self.target(url)
        except TargetRefused as error:
            return Violation("webhook_url", shown(url), error.bound, f"webhook_url {error}")
        return None

    def target(self, url: str) -> Target:
        """Parse a URL and check it against the rules.

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
            _normalize_host(found["host"]),
            int(found["port"] or SCHEME_PORTS[scheme]),
            path if path.startswith("/") else f"/{path}",
        )
        if not any(rule.allows(target) for rule in self.hosts):
            # The list of allowed hosts is not shown to callers: it is internal to the operators.
            raise TargetRefused(
                f"names {target.authority}, which this service may not call. Its operators allow "
                "hosts, and ports other than the usual one, with SERVICE_WEBHOOK_HOSTS.",
                "an address of a host in SERVICE_WEBHOOK_HOSTS",
            )
        return target


def is_literal(host: str) -> bool:
    """Return whether a host is an IP address and not a name."""
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def _normalize_host(host: str) -> str:
    return host.lower().strip("[]")


def _is_port(digits: str | None) -> bool:
    return digits is None or 1 <= int(digits) <= 65535


Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
"""Takes a host name and a port, returns the host's IP addresses, at least one. Raises OSError."""

_Networks = tuple[IPv4Network | IPv6Network, ...]


def _networks(*texts: str) -> _Networks:
    return tuple(map(ip_network, texts))


_NEVER: Final = _networks(
    "0.0.0.0/8",
    "169.254.0.0/16",  # link-local, where clouds answer with credentials
    "100.100.100.200/32",  # the same at Alibaba Cloud, among addresses of internal networks
    "168.63.129.16/32",  # Azure's, among public addresses
    "192.0.0.192/32",  # Oracle's, among addresses for protocols
    "fd00:42::42/128",  # Scaleway's, Oracle's, Amazon's and Google's, among internal networks
    "fd00:c1::/32",
    "fd00:ec2::/32",
    "fd20:ce::/32",
    "224.0.0.0/4",  # multicast
    "255.255.255.255/32",
    "::/96",  # unspecified, and deprecated IPv4-compatible addresses; loopback is let through below
    "::ffff:0:0/96",  # IPv4-mapped addresses
    "::ffff:0:0:0/96",  # IPv4-translated addresses
    "64:ff9b::/96",  # NAT64, and its local-use prefix: IPv4 behind a translator
    "64:ff9b:1::/48",
    "2001::/32",  # Teredo and 6to4: IPv4 in a tunnel
    "2002::/16",
    "fe80::/10",
    "ff00::/8",
)
"""Networks that hold no webhook receiver, so they are refused even with `private`."""

_METADATA: Final = tuple(
    map(IPv4Address, ("169.254.169.254", "100.100.100.200", "168.63.129.16", "192.0.0.192"))
)
"""Where clouds answer with credentials. An own NAT64 prefix may carry them in the last 32 bits."""

# Python's own list (`is_global`) is checked, too, but it grew from one release to the next.
_NOT_PUBLIC: Final = _networks(
    "10.0.0.0/8",
    "100.64.0.0/10",
    "127.0.0.0/8",
    "172.16.0.0/12",
    "192.0.0.0/24",
    "192.0.2.0/24",
    "192.88.99.0/24",
    "192.168.0.0/16",
    "198.18.0.0/15",
    "198.51.100.0/24",
    "203.0.113.0/24",
    "240.0.0.0/4",
    "2001::/23",
    "2001:db8::/32",
    "3fff::/20",
)
_GLOBAL_UNICAST: Final = IPv6Network("2000::/3")
_LOOPBACK: Final = IPv6Address("::1")


class AddressRefused(Exception):
    """A host has an IP address that may not be connected to."""


def check_address(text: str, *, private: bool) -> None:
    """Accept a public IP address, and with `private` also one of an internal network.

    Raises:
        AddressRefused: for any other address. The message names it, and is for the log only.
    """
    address = ip_address(text)
    never = address != _LOOPBACK and _is_in(address, _NEVER)
    if address.version == 6:
        never = never or IPv4Address(int(address) & 0xFFFFFFFF) in _METADATA
    if never or not (private or _is_public(address)):
        raise AddressRefused(f"the address {text} may not be called")


async def resolve(host: str, port: int) -> Sequence[str]:
    """Resolve a host name with the system's resolver; an IP address resolves to itself."""
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    # Each address once, in the system's order of preference.
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


def _is_public(address: IPv4Address | IPv6Address) -> bool:
    if isinstance(address, IPv6Address) and address not in _GLOBAL_UNICAST:
        return False
    return address.is_global and not _is_in(address, _NOT_PUBLIC)


def _is_in(address: IPv4Address | IPv6Address, networks: _Networks) -> bool:
    return any(address in network for network in networks)
