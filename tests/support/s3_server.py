"""A real S3 server on loopback (moto, in a process of its own), and a way to disturb it."""

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
    """Run a server on `port`, and give its address."""
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            endpoint = f"http://127.0.0.1:{port}"
            _wait_until_it_answers(process, f"{endpoint}/moto-api/")
            yield endpoint
        finally:
            process.terminate()


def make_bucket(endpoint: str, name: str) -> None:
    asked = urllib.request.Request(f"{endpoint}/{name}", method="PUT")
    urllib.request.urlopen(asked, timeout=30).close()


def _wait_until_it_answers(process: subprocess.Popen[bytes], url: str) -> None:
    end = time.monotonic() + 60
    while True:
        try:
            return urllib.request.urlopen(url, timeout=30).close()
        except URLError:
            if process.poll() is not None or time.monotonic() > end:
                raise
            time.sleep(0.05)


class Gate:
    """Stands between a client and the server at `endpoint`, and passes bytes on while it is open.

    Closed, it hangs up on whoever connects; with an `answer` it says that instead. After
    `hold_after` bytes from a client it passes nothing on any more, and `held` is set.
    """

    def __init__(self, endpoint: str) -> None:
        self._server = ("127.0.0.1", int(endpoint.rsplit(":", 1)[1]))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.is_open = True
        self.answer: bytes | None = None
        self.hold_after: int | None = None
        self.held = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        # Wakes the thread that waits in accept(), which close() alone does not.
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
        passed = 0
        while data := client.recv(65536):
            passed += len(data)
            if self.hold_after is not None and passed > self.hold_after:
                self.held.set()
                continue
            server.sendall(data)
        server.shutdown(socket.SHUT_WR)


def _pump(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
