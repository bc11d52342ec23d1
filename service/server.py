"""Start the service: read the settings, open the port, configure logging and run uvicorn.

An error that prevents the start ends the process with one line on stderr.
"""

import logging
import resource
import socket
import sys
from typing import Any, cast

import uvicorn
from fastapi import FastAPI
from pydantic import ValidationError
from redis.exceptions import RedisError

from jobs.errors import ArtifactRefused
from jobs.redis_client import BRIEF, connect
from jobs.telemetry import tracing
from service.api.events.hub import EventHub
from service.app import create_app
from service.auth.api_keys import KeyStore
from service.middleware.connections import PARTS, Connections, Deadlines
from service.middleware.request_log import configure_logging
from service.monitoring.systemd import SystemdNotifier
from service.settings import ServiceSettings

logger = logging.getLogger("service")

GRACE_S = 3
"""Seconds that open requests may take once the service is to end. Without a limit, a client that
never finishes its request, or never reads its video, would keep the process running for ever."""


WAITING_CONNECTIONS = 2048
"""How many connections may wait in the kernel until they are accepted."""

ACCEPTED_AT_ONCE = 32
"""How many are accepted before other work is done. Where none can be accepted, for lack of
descriptors, Python tries and logs so many times a second."""

OTHER_FILES = 256
"""Descriptors that are kept for Redis, the bucket, videos and the like."""


def start() -> None:
    """Run the service until it gets a signal to end."""
    try:
        settings = ServiceSettings()
        tracing.start(settings, "wan-service")
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
    http_server(app, settings, _most_connections(settings)).run(sockets=[listener])


def http_server(app: FastAPI, settings: ServiceSettings, most_connections: int) -> "Server":
    """Make the server of an application; at most so many connections are open at a time."""
    deadlines = Deadlines(idle_s=settings.keep_alive_s)
    connections = Connections(most_connections, deadlines)
    config = uvicorn.Config(
        app,
        http=cast("Any", connections.protocol),
        ws="none",
        log_config=None,
        access_log=False,  # `service/middleware/request_log.py` writes it
        timeout_graceful_shutdown=GRACE_S,
        timeout_keep_alive=settings.keep_alive_s,
        backlog=ACCEPTED_AT_ONCE,
        server_header=False,
    )
    return Server(config, app.state.app_state.hub, connections)


class Server(uvicorn.Server):
    """A uvicorn server that ends the event streams when it shuts down; it would wait for them.

    It also closes the connections that are past their deadlines, and tells systemd how it is.
    """

    def __init__(
        self, config: uvicorn.Config, hub: EventHub, connections: Connections | None = None
    ) -> None:
        super().__init__(config)
        self._hub = hub
        self._connections = connections
        self._systemd = SystemdNotifier()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start as uvicorn does, with a longer queue of connections that wait to be accepted."""
        await super().startup(sockets)
        for each in sockets or []:
            each.listen(WAITING_CONNECTIONS)
        self._systemd.ready()

    async def on_tick(self, counter: int) -> bool:
        """Do what is due; uvicorn calls this every 0.1 s, and asks whether to end."""
        if self._connections is not None:
            self._connections.sweep(counter % PARTS)
        self._systemd.alive()
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End the event streams, then shut down as uvicorn does."""
        self._systemd.stopping()
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
            usable = any(key.is_usable for key in KeyStore(redis).all())
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


def _most_connections(settings: ServiceSettings) -> int:
    """Let the process open as many files as it may; return how many may be connections."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2**20 if hard == resource.RLIM_INFINITY else hard
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    except (ValueError, OSError) as error:  # more than the kernel allows any process
        logger.warning("The limit of open files stays at %d: %s", soft, error)
    possible = max(soft - OTHER_FILES, soft // 2)
    if possible < settings.max_connections:
        logger.warning(
            "SERVICE_MAX_CONNECTIONS is %d, and the limit of %d open files leaves %d; raise the "
            "limit (ulimit -Hn, LimitNOFILE).",
            *(settings.max_connections, soft, possible),
        )
    return min(settings.max_connections, possible)


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
    if any(key.is_usable for key in found):
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
        listener.listen(WAITING_CONNECTIONS)
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
