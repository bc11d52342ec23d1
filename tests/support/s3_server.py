"""Run a real S3 server on loopback (moto, in its own process), and a proxy that makes it fail."""

import contextlib
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from urllib.error import URLError


@contextlib.contextmanager
def s3_server(port: int) -> Iterator[str]:
    """Run a server on `port`; yields its URL."""
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            endpoint = f"http://127.0.0.1:{port}"
            _wait_until_ready(process, f"{endpoint}/moto-api/")
            yield endpoint
        finally:
            process.terminate()


def make_bucket(endpoint: str, name: str) -> None:
    """Create an empty bucket."""
    request = urllib.request.Request(f"{endpoint}/{name}", method="PUT")
    urllib.request.urlopen(request, timeout=30).close()


def _wait_until_ready(process: subprocess.Popen[bytes], url: str) -> None:
    end = time.monotonic() + 60
    while True:
        try:
            return urllib.request.urlopen(url, timeout=30).close()
        except URLError:
            if process.poll() is not None or time.monotonic() > end:
                raise
            time.sleep(0.05)


class FaultyProxy:
    """A TCP proxy before the server at `endpoint`, which can be made to fail.

    Attributes:
        endpoint: the URL of the proxy.
        is_open: if False, connections are closed at once.
        answer: if set, the response to every request, which the server then does not receive.
        pause_after: after this many bytes from a client, the proxy forwards no more of them, and
            sets `paused`.
        passes: while this event is not set, requests wait.
    """

    def __init__(self, endpoint: str) -> None:
        self._server = ("127.0.0.1", int(endpoint.rsplit(":", 1)[1]))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.is_open = True
        self.answer: bytes | None = None
        self.pause_after: int | None = None
        self.paused = threading.Event()
        self.passes = threading.Event()
        self.passes.set()
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        # shutdown() ends the accept() of the other thread, which close() alone does not.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            if self.answer is not None:
                client.recv(65536)
                client.sendall(self.answer)
            elif self.is_open:
                with socket.create_connection(self._server) as server:
                    back = threading.Thread(target=_pump, args=(server, client), daemon=True)
                    back.start()
                    self._forward(client, server)
                    back.join()

    def _forward(self, client: socket.socket, server: socket.socket) -> None:
        forwarded = 0
        while data := client.recv(65536):
            forwarded += len(data)
            if self.pause_after is not None and forwarded > self.pause_after:
                self.paused.set()
                continue
            self.passes.wait()
            server.sendall(data)
        server.shutdown(socket.SHUT_WR)


def _pump(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
