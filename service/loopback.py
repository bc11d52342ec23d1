"""Which names and addresses mean this machine."""

import ipaddress


def is_loopback(host: str) -> bool:
    """Say whether a host is this machine, without asking a name server."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
