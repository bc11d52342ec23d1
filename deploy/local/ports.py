"""Find and check free ports on the loopback address."""

import errno
import socket

from deploy.local.errors import LocalError

LOOPBACK = "127.0.0.1"
_LAST_PORT = 65535


def require_free(port: int, owner: str, option: str) -> None:
    """Check that `owner` can listen on `port`.

    Raises:
        LocalError: it cannot; the error names `option` as the remedy.
    """
    if not 1 <= port <= _LAST_PORT:
        raise LocalError(f"{port} is not a port: {option} takes 1 to {_LAST_PORT}")
    try:
        _listen(port).close()
    except OSError as error:
        reason = {errno.EADDRINUSE: "in use", errno.EACCES: "reserved for root"}.get(
            error.errno or 0, error.strerror
        )
        raise LocalError(
            f"port {port} on {LOOPBACK}, which the {owner} needs, is {reason}: "
            f"stop what listens there, or choose another with {option}"
        ) from error


def find_free_port() -> int:
    """Return a port that no process listens on now."""
    with _listen(0) as listening:
        return int(listening.getsockname()[1])


def _listen(port: int) -> socket.socket:
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        # As servers set it: a port whose last connections are in TIME_WAIT counts as free.
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((LOOPBACK, port))
        listening.listen()
    except BaseException:
        listening.close()
        raise
    return listening
