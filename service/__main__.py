"""Run the service: `python -m service`, configured by the environment (`service/settings.py`).

Whatever prevents the start ends it with one clear line on stderr.
"""

import logging
import logging.config
import socket
import sys

import uvicorn
from pydantic import ValidationError

from jobs.errors import ArtifactRefused
from service.app import create_app
from service.settings import ServiceSettings

logger = logging.getLogger("service")

GRACE_S = 3
"""How long requests that are still open may take once the service was told to end. Without a bound
one client that never finishes its request, or never reads its video, keeps the process for ever."""

_LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"line": {"format": "%(asctime)s %(levelname)s %(name)s: %(message)s"}},
    "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "line"}},
    "root": {"level": "INFO", "handlers": ["stderr"]},
}


def main() -> None:
    try:
        settings = ServiceSettings()
        app = create_app(settings)
    except ValidationError as error:
        sys.exit("\n".join(f"service: {_sentence(each)}." for each in error.errors()))
    except (ArtifactRefused, OSError) as error:
        sys.exit(f"service: {error}")
    listener = _listen(settings.host, settings.port)
    host, port = listener.getsockname()[:2]
    logging.config.dictConfig(_LOGGING)
    logger.info("listening on http://%s:%s", f"[{host}]" if ":" in host else host, port)
    # The access log shows paths and query strings; prompts travel in bodies only.
    config = uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=GRACE_S)
    uvicorn.Server(config).run(sockets=[listener])


def _listen(host: str, port: int) -> socket.socket:
    """Take the port before the server starts, so that a taken one is one line and not a log."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(2048)
    except OSError as error:
        listener.close()
        sys.exit(
            f"service: cannot listen on {host}, port {port}: {error.strerror}. Stop what uses it, "
            f"or set SERVICE_PORT to another port (0 takes a free one)."
        )
    return listener


def _sentence(error: object) -> str:
    """Say in one line which variable is wrong and why."""
    assert isinstance(error, dict), "pydantic's errors are dicts"
    reason = "is required" if error["type"] == "missing" else error["msg"]
    return f"{error['loc'][0]}: {str(reason).removeprefix('Value error, ')}"


if __name__ == "__main__":
    main()
