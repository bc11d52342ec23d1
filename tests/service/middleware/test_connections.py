"""Test that silent, slow and too many connections are closed, over real sockets and a set clock."""

import asyncio
import json
import logging
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
import uvicorn
from uvicorn.server import ServerState

from deploy.local.waiting import wait_until
from service.middleware.connections import (
    MOST_CLOSED,
    PARTS,
    SAID_EVERY_S,
    SMALLEST_SHARE,
    BoundedConnection,
    Connections,
    Deadlines,
)
from tests.support.http_service import address_in

REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\n"
LARGE = 32 * 1024 * 1024


async def application(scope: Any, receive: Any, send: Any) -> None:
    """Read the body; answer with 2 bytes, or with LARGE for the path /large, or never."""
    if scope["path"] == "/never":
        await asyncio.Event().wait()
    while (await receive()).get("more_body"):
        pass
    body = bytes(LARGE) if scope["path"] == "/large" else b"ok"
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class Place:
    """A server whose seconds pass only when a test says so."""

    def __init__(self, connections: Connections, port: int) -> None:
        self.connections = connections
        self.port = port
        self.now = 0.0
        self.clients: list[asyncio.StreamWriter] = []

    async def client(self, sent: bytes = b"") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        self.clients.append(writer)
        writer.write(sent)
        await writer.drain()
        return reader, writer

    async def pass_s(self, seconds: float) -> None:
        """Let seconds pass, as the server sees them: with a sweep before and after."""
        await self.settle()
        self.connections.sweep()
        self.now += seconds
        self.connections.sweep()
        await self.settle()

    async def settle(self) -> None:
        """Let what was sent arrive, and the server work on it."""
        for _ in range(20):
            await asyncio.sleep(0.002)


Test = Callable[[Place], Coroutine[Any, Any, None]]


@asynccontextmanager
async def place(
    most: int = 100, shared: bool = True, deadlines: Deadlines | None = None
) -> AsyncIterator[Place]:
    config = uvicorn.Config(application, log_config=None, lifespan="off", ws="none")
    config.load()
    state = ServerState()
    made: list[Place] = []
    connections = Connections(most, deadlines, lambda: made[0].now)

    class OfStranger(BoundedConnection):
        """A connection of an address that is no proxy's."""

        def _client(self) -> tuple[str, bool]:
            return "203.0.113.9", False

    def protocol() -> BoundedConnection:
        kind = BoundedConnection if shared else OfStranger
        return kind(connections, config=config, server_state=state, app_state={})

    loop = asyncio.get_running_loop()
    server = await loop.create_server(protocol, "127.0.0.1", 0)
    made.append(Place(connections, server.sockets[0].getsockname()[1]))
    try:
        yield made[0]
    finally:
        server.close()
        for task in state.tasks:
            task.cancel()
        for transport in [each.transport for each in (*made[0].clients, *state.connections)]:
            transport.abort()
        await asyncio.sleep(0.01)


def run(test: Test, **options: Any) -> None:
    async def whole() -> None:
        async with place(**options) as where:
            await test(where)

    asyncio.run(whole())


async def is_closed(reader: asyncio.StreamReader) -> bool:
    """Return whether the server has closed the connection, without sending anything more."""
    try:
        async with asyncio.timeout(1):
            return await reader.read(1) == b""
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False


async def answer(reader: asyncio.StreamReader) -> tuple[int, dict[str, Any]]:
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
    body = await reader.readexactly(length)
    return int(head.split()[1]), json.loads(body) if body.startswith(b"{") else {}


def test_a_silent_connection_is_closed_after_ten_seconds() -> None:
    async def test(where: Place) -> None:
        reader, _ = await where.client()
        await where.pass_s(9)
        assert len(where.connections) == 1
        await where.pass_s(1)
        assert await is_closed(reader)
        assert len(where.connections) == 0

    run(test)


@pytest.mark.parametrize("sent", [b"G", REQUEST[:-2]])
def test_half_a_head_is_answered_408_however_slowly_it_goes_on(sent: bytes) -> None:
    async def test(where: Place) -> None:
        reader, writer = await where.client(sent)
        await where.pass_s(5)
        writer.write(b"X-More: 1\r\n" if sent.endswith(b"\n") else b"E")
        await where.pass_s(5)
        status, problem = await answer(reader)
        assert (status, problem["code"]) == (408, "request_timeout")
        assert "10 s" in problem["detail"]
        assert await is_closed(reader)

    run(test)


def test_half_a_body_is_answered_408_after_thirty_seconds() -> None:
    async def test(where: Place) -> None:
        reader, writer = await where.client(POST + b"12345")
        await where.pass_s(15)
        writer.write(b"6")
        await where.pass_s(14)
        assert len(where.connections) == 1
        await where.pass_s(1)
        assert (await answer(reader))[0] == 408
        assert await is_closed(reader)

    run(test)


def test_half_a_second_request_is_answered_408_too() -> None:
    async def test(where: Place) -> None:
        reader, writer = await where.client(REQUEST)
        assert (await answer(reader))[0] == 200
        await where.pass_s(30)
        writer.write(REQUEST[:-2])
        await where.pass_s(9)
        assert len(where.connections) == 1
        await where.pass_s(1)
        assert (await answer(reader))[0] == 408

    run(test)


def test_an_idle_connection_is_closed_after_the_time_that_is_set() -> None:
    async def test(where: Place) -> None:
        reader, _ = await where.client(REQUEST)
        assert (await answer(reader))[0] == 200
        await where.pass_s(89)
        assert len(where.connections) == 1
        await where.pass_s(1)
        assert await is_closed(reader)

    run(test, deadlines=Deadlines(idle_s=90))


def test_a_client_that_goes_on_asking_is_never_closed() -> None:
    async def test(where: Place) -> None:
        reader, writer = await where.client()
        for _ in range(5):
            writer.write(REQUEST)
            assert (await answer(reader))[0] == 200
            writer.write(REQUEST[:10])
            await where.pass_s(8)
            writer.write(REQUEST[10:])
            assert (await answer(reader))[0] == 200
        assert len(where.connections) == 1

    run(test)


def test_the_service_may_take_any_time() -> None:
    async def test(where: Place) -> None:
        await where.client(REQUEST.replace(b"/ ", b"/never ", 1))
        await where.pass_s(100_000)
        assert len(where.connections) == 1

    run(test)


def test_a_client_that_takes_nothing_of_its_answer_is_given_up() -> None:
    async def test(where: Place) -> None:
        reader, _ = await where.client(REQUEST.replace(b"/ ", b"/large ", 1))
        reader._transport.pause_reading()  # type: ignore[attr-defined]
        await where.pass_s(59)
        assert len(where.connections) == 1
        await where.pass_s(1)
        assert len(where.connections) == 0

    run(test)


def test_one_too_many_takes_the_place_of_the_one_that_waits_longest() -> None:
    async def test(where: Place) -> None:
        busy, _ = await where.client(REQUEST.replace(b"/ ", b"/never ", 1))
        silent = [await where.client() for _ in range(2)]
        await where.settle()
        new, _ = await where.client(REQUEST)
        assert (await answer(new))[0] == 200
        assert await is_closed(silent[0][0])
        assert not await is_closed(silent[1][0])
        assert not await is_closed(busy)
        assert len(where.connections) == 3

    run(test, most=3)


def test_where_all_work_a_new_one_is_refused() -> None:
    async def test(where: Place) -> None:
        for _ in range(3):
            await where.client(REQUEST.replace(b"/ ", b"/never ", 1))
            await where.settle()
        reader, _ = await where.client()
        status, problem = await answer(reader)
        assert (status, problem["code"]) == (503, "too_many_connections")
        assert await is_closed(reader)
        assert len(where.connections) == 3

    run(test, most=3)


def test_one_address_may_have_a_tenth() -> None:
    async def test(where: Place) -> None:
        silent = [await where.client() for _ in range(SMALLEST_SHARE)]
        await where.settle()
        assert len(where.connections) == SMALLEST_SHARE
        reader, _ = await where.client(REQUEST)
        assert (await answer(reader))[0] == 200
        assert await is_closed(silent[0][0])
        assert len(where.connections) == SMALLEST_SHARE

    run(test, shared=False)


def test_thousands_that_came_together_are_not_closed_all_at_once() -> None:
    async def test(where: Place) -> None:
        many = PARTS * (MOST_CLOSED + 1)
        for _ in range(many):
            await where.client()
        await where.settle()
        where.now += 10
        for part in range(PARTS):
            where.connections.sweep(part)
        await where.settle()
        assert len(where.connections) == PARTS
        for part in range(PARTS):
            where.connections.sweep(part)
        await where.settle()
        assert len(where.connections) == 0

    run(test, most=1000)


def test_what_is_closed_is_said_in_one_line_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    async def test(where: Place) -> None:
        for _ in range(50):
            await where.client()
        await where.pass_s(10)
        for _ in range(50):
            await where.client()
        await where.pass_s(SAID_EVERY_S - 0.1)
        await where.pass_s(0.1)

    with caplog.at_level(logging.WARNING):
        run(test)
    assert (
        caplog.messages
        == ["closed connections: 50 waited 10 s for the head of a request; 0 are open"] * 2
    )


@pytest.mark.parametrize(
    ("peer", "counted", "shared"),
    [
        ("203.0.113.9", "203.0.113.9", False),
        ("::ffff:203.0.113.9", "203.0.113.9", False),
        ("2001:db8::1", "2001:db8::/64", False),
        ("127.0.0.1", "127.0.0.1", True),
        ("::1", "::/64", True),
        ("::ffff:127.0.0.1", "127.0.0.1", True),
        ("10.0.0.7", "10.0.0.7", True),
        ("10.0.0.8", "10.0.0.8", False),
        ("", "", True),
    ],
)
def test_whose_connection_it_is(peer: str, counted: str, shared: bool) -> None:
    config = uvicorn.Config(
        application, log_config=None, lifespan="off", ws="none", forwarded_allow_ips="10.0.0.7"
    )
    config.load()

    async def made() -> tuple[str, bool]:
        connection = BoundedConnection(
            Connections(10), config=config, server_state=ServerState(), app_state={}
        )
        connection.client = (peer, 1) if peer else None
        return connection._client()

    assert asyncio.run(made()) == (counted, shared)


@pytest.mark.parametrize("limit", ["ulimit -n 512", "ulimit -Sn 300"])
def test_a_process_with_few_descriptors_answers_beside_silent_connections(
    redis_url: str, tmp_path: Path, limit: str
) -> None:
    environment = {
        **{"REDIS_URL": redis_url, "ARTIFACTS_URL": (tmp_path / "artifacts").as_uri()},
        **{"SERVICE_PORT": "0", "SERVICE_STATE_DIR": str(tmp_path / "state")},
    }
    log = tmp_path / "log"
    with ExitStack() as stack:
        process = stack.enter_context(
            subprocess.Popen(
                ["bash", "-c", f"{limit}; exec {sys.executable} -m service"],
                env={**os.environ, **environment},
                stderr=stack.enter_context(log.open("w")),
            )
        )
        stack.callback(process.kill)
        wait_until(lambda: "listening on" in log.read_text(), 60)
        url = address_in(log.read_text())
        wait_until(lambda: _answers(url), 60)
        port = int(url.rpartition(":")[2])
        for _ in range(600):
            stack.enter_context(socket.create_connection(("127.0.0.1", port)))
        for _ in range(5):
            assert httpx2.get(f"{url}/healthz", trust_env=False).status_code == 200
        # All 600 where the limit could be raised, else as many as it allows, and others beside.
        is_open = len(os.listdir(f"/proc/{process.pid}/fd"))
        assert is_open > 600 if "-S" in limit else 256 <= is_open < 400
    assert "Traceback" not in log.read_text()
    assert log.stat().st_size < 10_000


def _answers(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/healthz", trust_env=False).status_code == 200
    except httpx2.TransportError:
        return False
