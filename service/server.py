"""Start the service: read the settings, open the port, configure logging and run uvicorn.

An error that prevents the start ends the process with one line on stderr.
"""

import logging
import socket
import sys

import uvicorn
from pydantic import ValidationError
from redis.exceptions import RedisError

from jobs.errors import ArtifactRefused
from jobs.redis_client import BRIEF, connect
from service.api.events.hub import EventHub
from service.app import create_app
from service.auth.api_keys import KeyStore
from service.middleware.request_log import configure_logging
from service.settings import ServiceSettings

logger = logging.getLogger("service")

GRACE_S = 3
"""Seconds that open requests may take once the service is to end. Without a limit, a client that
never finishes its request, or never reads its video, would keep the process running for ever."""


def start() -> None:
    """Run the service until it gets a signal to end."""
    try:
        settings = ServiceSettings()
        app = create_app(settings)
    except ValidationError as error:
        sys.exit(describe_errors(error))
    except (ArtifactRefused, OSError) as error:
        sys.exit(f"service: {error}")
    if not settings.is_local:
        _require_api_key(settings)
    listener = _listen(settings.host, settings.port)
    host, port = listener.getsockname()[:2]
    configure_logging(settings.log_format)
    logger.info("listening on http://%s:%s", f"[{host}]" if ":" in host else host, port)
    _say_who_may_use_it(settings)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,  # `service/middleware/request_log.py` writes it
        timeout_graceful_shutdown=GRACE_S,
        server_header=False,
    )
    Server(config, app.state.app_state.hub).run(sockets=[listener])


class Server(uvicorn.Server):
    """A uvicorn server that ends the event streams when it shuts down; it would wait for them."""

    def __init__(self, config: uvicorn.Config, hub: EventHub) -> None:
        super().__init__(config)
        self._hub = hub

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End the event streams, then shut down as uvicorn does."""
        self._hub.end_streams()
        await super().shutdown(sockets)


def describe_errors(error: ValidationError) -> str:
    """Describe each environment variable that is wrong in one line."""
    return "\n".join(f"service: {_describe_error(each)}." for each in error.errors())


def _require_api_key(settings: ServiceSettings) -> None:
    """Exit if there is no usable API key, for a service that other machines can reach."""
    exposed = f"service: SERVICE_HOST: {settings.host} is reachable from outside"
    try:
        with connect(settings.redis_url.get_secret_value()) as redis:
            usable = any(key.revoked_at is None for key in KeyStore(redis).all())
    except RedisError as error:
        sys.exit(
            f"{exposed}, so API keys are needed, and Redis, which holds them, cannot be asked: "
            f"{error} Start Redis, correct REDIS_URL, or listen on 127.0.0.1."
        )
    if not usable:
        sys.exit(
            f"{exposed}, and there is no API key that could be used. Make one with "
            f"`python -m service keys add NAME --role ops`, or listen on 127.0.0.1."
        )


def _say_who_may_use_it(settings: ServiceSettings) -> None:
    """Log whether callers need a key, and why; note that there are keys if there are."""
    memory = settings.key_memory
    had_keys = memory is not None and memory.had_keys()
    try:
        with connect(settings.redis_url.get_secret_value(), BRIEF) as redis:
            found = KeyStore(redis).all()
    except RedisError:
        logger.warning("Whether callers need an API key is not known before Redis answers.")
        return
    if found and memory is not None:
        memory.note()
    if any(key.revoked_at is None for key in found):
        logger.info("Callers need an API key.")
    elif found or not settings.may_be_open:
        logger.warning(
            "Callers need an API key, and there is none that could be used; make one with "
            "`python -m service keys add NAME`."
        )
    elif memory is not None and had_keys:
        logger.warning(
            "Callers need an API key, and Redis holds none, though this service had keys (%s). "
            "Check that REDIS_URL names the right database and that its data is there, or make "
            "keys again. SERVICE_KEYS=open opens the service without keys.",
            memory.path,
        )
    else:
        logger.warning(
            "The service is open: everybody who reaches it may do everything until the first API "
            "key is made. SERVICE_KEYS=required closes it."
        )


def _listen(host: str, port: int) -> socket.socket:
    """Bind the port before the server starts, so that a port in use is reported in one line."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sets TCP_NODELAY only if the protocol is given explicitly. With 0, each answer on a
    # kept-alive connection waited 40 ms for the caller's acknowledgement.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
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


def _describe_error(error: object) -> str:
    assert isinstance(error, dict), "pydantic's errors are dicts"
    reason = "is required" if error["type"] == "missing" else error["msg"]
    # An error about several variables has no `loc`, and names them itself.
    variable = f"{error['loc'][0]}: " if error["loc"] else ""
    return variable + str(reason).removeprefix("Value error, ")
