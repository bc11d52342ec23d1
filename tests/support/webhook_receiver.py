"""Run a real receiver of webhooks, over HTTP or TLS, with configurable answers."""

import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Call:
    """One request that was received."""

    path: str
    headers: Mapping[str, str]
    body: bytes


Answer = Callable[[BaseHTTPRequestHandler, int], None]
"""Takes the handler, after it has read the request, and the number of the call, from 1."""


def status(code: int, **headers: str) -> Answer:
    def answer(handler: BaseHTTPRequestHandler, _: int) -> None:
        handler.send_response(code)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return answer


def in_turn(*codes: int) -> Answer:
    """Answer with these statuses in turn, and then always with the last."""
    return lambda handler, number: status(codes[min(number, len(codes)) - 1])(handler, number)


@dataclass
class Receiver:
    """The calls that came, and how they are answered; `ending` is set once it stops to listen."""

    answer: Answer = field(default_factory=lambda: status(204))
    calls: list[Call] = field(default_factory=list)
    came: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    ending: threading.Event = field(default_factory=threading.Event)
    port: int = 0

    def wait(self, calls: int = 1, timeout: float = 20) -> None:
        for _ in range(calls):
            assert self.came.acquire(timeout=timeout), f"only {len(self.calls)} calls came"

    @contextmanager
    def listening(
        self, host: str = "127.0.0.1", port: int = 0, context: ssl.SSLContext | None = None
    ) -> Iterator["Receiver"]:
        """Listen until the end of the block; may be called again afterwards."""
        server = _Server((host, port), _handler_of(self))
        self.port = server.server_address[1]
        if context is not None:
            server.socket = context.wrap_socket(
                server.socket, server_side=True, do_handshake_on_connect=False
            )
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield self
        finally:
            self.ending.set()
            server.shutdown()
            server.server_close()
            thread.join()
            self.ending.clear()


def hold(receiver: Receiver) -> Answer:
    """Delay every answer until the receiver ends."""

    def answer(handler: BaseHTTPRequestHandler, _: int) -> None:
        receiver.ending.wait(60)

    return answer


class _Server(ThreadingHTTPServer):
    # A test ends without waiting for callers that hold their connection.
    block_on_close = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print nothing: some tests make callers disconnect, or distrust the certificate."""


def _handler_of(receiver: Receiver) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            receiver.calls.append(Call(self.path, dict(self.headers), body))
            receiver.came.release()
            with suppress(ConnectionError):
                receiver.answer(self, len(receiver.calls))

        def log_message(self, *_: object) -> None:
            pass

    return Handler
