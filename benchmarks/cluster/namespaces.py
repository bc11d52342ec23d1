"""Make hosts of a network out of network namespaces: each has an address and a cable of its own.

All hosts hang on one bridge, and this process reaches them over it. A cable can be pulled, after
which packets vanish, as they do when a real one is pulled: nobody is told. Processes, files and
clocks are shared, so what is shown is a network's faults and not a machine's. Only root can do it.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

NETWORK: Final = "198.18.77"
"""A part of 198.18.0.0/15, which is set aside for benchmarks (RFC 2544)."""


class Host:
    """One host. `address` is its IP address."""

    def __init__(self, namespace: str, address: str, cable: str) -> None:
        self.namespace = namespace
        self.address = address
        self._cable = cable

    def command(self, *command: str) -> list[str]:
        """Return the command that runs `command` on this host; it keeps the process id."""
        return ["ip", "netns", "exec", self.namespace, *command]

    def pull_cable(self) -> None:
        """Drop everything that is sent to or from this host."""
        _ip("link", "set", self._cable, "down")

    def plug_in(self) -> None:
        """Put the cable back."""
        _ip("link", "set", self._cable, "up")

    def kill_everything(self) -> int:
        """Kill every process of this host at once, as a power cut does; return how many."""
        pids = [int(each) for each in _ip("netns", "pids", self.namespace).split()]
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return len(pids)


class Network:
    """A context manager; outside of it the hosts are gone, with whatever ran on them."""

    def __init__(self) -> None:
        if os.geteuid() != 0:
            raise PermissionError("network namespaces need root: run this as root")
        self._mark = secrets.token_hex(3)
        self._bridge = f"wan{self._mark}"
        self.hosts: dict[str, Host] = {}

    def __enter__(self) -> Network:
        _ip("link", "add", self._bridge, "type", "bridge")
        try:
            _ip("address", "add", f"{NETWORK}.1/24", "dev", self._bridge)
            _ip("link", "set", self._bridge, "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for host in self.hosts.values():
            with suppress(subprocess.CalledProcessError):
                host.kill_everything()
                _ip("netns", "delete", host.namespace)
        _ip("link", "delete", self._bridge)

    def add(self, name: str) -> Host:
        """Add a host."""
        number = len(self.hosts) + 10
        namespace, cable = f"wan-{self._mark}-{name}", f"w{self._mark}-{number}"
        host = self.hosts[name] = Host(namespace, f"{NETWORK}.{number}", cable)
        _ip("netns", "add", namespace)
        _ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", namespace)
        _ip("link", "set", cable, "master", self._bridge, "up")
        _ip("-n", namespace, "address", "add", f"{host.address}/24", "dev", "eth0")
        _ip("-n", namespace, "link", "set", "eth0", "up")
        _ip("-n", namespace, "link", "set", "lo", "up")
        return host


def _ip(*arguments: str) -> str:
    command: Sequence[str] = ("ip", *arguments)
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return done.stdout
