"""The service on a real port in a thread of this process, so that a test can look inside."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import uvicorn

from service.api.events.hub import EventHub
from service.app import create_app
from service.server import Server
from service.settings import ServiceSettings


@dataclass(frozen=True)
class Site:
    url: str
    hub: EventHub


@contextmanager
def serving(settings: ServiceSettings) -> Iterator[Site]:
    app = create_app(settings)
    hub: EventHub = app.state.parts.hub
    config = uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=3)
    server = Server(config, hub)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            wait_until(lambda: server.started)
            yield Site(f"http://127.0.0.1:{port}", hub)
        finally:
            server.should_exit = True
            thread.join(20)
    assert not thread.is_alive()


def wait_until(condition: Callable[[], bool], limit_s: float = 10) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.02)
