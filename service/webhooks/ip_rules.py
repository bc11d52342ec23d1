"""What a host's name stands for, and whether that may be connected to.

A name on the list of allowed hosts may still be made to point into the service's own network. So it
is resolved once, every address it has must be a public one, and the connection goes to one of these
addresses: an answer that changes in between changes nothing.
"""

import asyncio
import socket
from collections.abc import Awaitable, Callable, Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Final

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
"""Takes a host's name and a port; answers its addresses, at least one. Raises OSError."""

_Networks = tuple[IPv4Network | IPv6Network, ...]


def _networks(*texts: str) -> _Networks:
    return tuple(map(ip_network, texts))


_NEVER: Final = _networks(
    "0.0.0.0/8",
    "169.254.0.0/16",  # link-local, where clouds answer with credentials
    "224.0.0.0/4",  # multicast
    "255.255.255.255/32",
    "::/96",  # unspecified, loopback apart, and IPv4 in old disguise
    "::ffff:0:0/96",  # IPv4 in the usual one
    "64:ff9b::/96",  # NAT64: IPv4 behind a translator
    "64:ff9b:1::/48",
    "2001::/32",  # Teredo, and 6to4: IPv4 in a tunnel
    "2002::/16",
    "fe80::/10",
    "ff00::/8",
)
"""Nobody's webhook, in whatever network."""

# Python's own list (`is_global`) is asked, too; it grew from one release to the next.
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
    """A host has an address that may not be connected to."""


def check_address(text: str, *, private: bool) -> None:
    """Let a public address pass, and with `private` also one of an internal network.

    Raises:
        AddressRefused: any other. The sentence names the address, and is for the log.
    """
    address = ip_address(text)
    never = address != _LOOPBACK and _is_in(address, _NEVER)
    if never or not (private or _is_public(address)):
        raise AddressRefused(f"the address {text} may not be called")


async def resolve(host: str, port: int) -> Sequence[str]:
    """Ask the system; also turns an IP address into itself."""
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    # Once each, in the system's order of preference.
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


def _is_public(address: IPv4Address | IPv6Address) -> bool:
    if isinstance(address, IPv6Address) and address not in _GLOBAL_UNICAST:
        return False
    return address.is_global and not _is_in(address, _NOT_PUBLIC)


def _is_in(address: IPv4Address | IPv6Address, networks: _Networks) -> bool:
    return any(address in network for network in networks)
