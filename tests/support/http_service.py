"""Run the service on a real port, in a thread of this process or as a process of its own.

In a thread, a test can inspect its event hub.
"""

import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from deploy.local.waiting import wait_until
from service.api.downloads import Downloads
from service.api.events.hub import EventHub
from service.app import create_app
from service.server import http_server
from service.settings import ServiceSettings


@dataclass(frozen=True)
class Site:
    url: str
    hub: EventHub
    downloads: Downloads


@contextmanager
def serving(settings: ServiceSettings, port: int = 0) -> Iterator[Site]:
    app = create_app(settings)
    hub: EventHub = app.state.app_state.hub
    server = http_server(app, settings, settings.max_connections)
    with socket.create_server(("127.0.0.1", port)) as listener:
        port = listener.getsockname()[1]
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            wait_until(lambda: server.started)
            yield Site(f"http://127.0.0.1:{port}", hub, app.state.app_state.downloads)
        finally:
            server.should_exit = True
            thread.join(20)
    assert not thread.is_alive()


@contextmanager
def service(**environment: str) -> Iterator["subprocess.Popen[str]"]:
    process = subprocess.Popen(
        [sys.executable, "-m", "service"],
        env={**os.environ, **environment},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def address(process: "subprocess.Popen[str]") -> str:
    """Read the log up to the line with the URL of the service, and return the URL."""
    assert process.stderr is not None
    for line in process.stderr:
        if "listening on" in line:
            return address_in(line)
    raise AssertionError("the service ended without listening")


def address_in(line: str) -> str:
    """Return the URL in the log line about listening, in either log format."""
    found = re.search(r'listening on (http://[^\s"]+)', line)
    assert found, f"no address in {line!r}"
    return found.group(1)
