"""Generate HTTP load cheaply: HTTP/1.1 over persistent connections, one process, no library.

A full HTTP client would use more of the two cores than the server under test, so the benchmark
would measure the client. This one sends prepared bytes and reads the responses.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

NO_RESPONSE = 0
"""The status of a request that got no response."""


@dataclass(slots=True)
class Responses:
    """The responses of one run: the latency of each in seconds, and the number of each status."""

    seconds: list[float] = field(default_factory=list)
    statuses: dict[int, int] = field(default_factory=dict)

    def add(self, status: int, seconds: float) -> None:
        """Add one response."""
        self.statuses[status] = self.statuses.get(status, 0) + 1
        self.seconds.append(seconds)


def request_bytes(method: str, path: str, headers: dict[str, str], body: bytes = b"") -> bytes:
    """Return one HTTP request as bytes."""
    lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


async def run_closed_loop(port: int, request: bytes, clients: int, seconds: float) -> Responses:
    """Have each of `clients` send the same request again as soon as it has the response."""
    responses = Responses()
    end = time.perf_counter() + seconds

    async def client() -> None:
        async with connection(port) as (reader, writer):
            while time.perf_counter() < end:
                started = time.perf_counter()
                writer.write(request)
                status = await read_response(reader)
                responses.add(status, time.perf_counter() - started)

    await asyncio.gather(*(client() for _ in range(clients)))
    return responses


async def run_open_loop(port: int, request: bytes, per_second: float, seconds: float) -> Responses:
    """Send requests at a fixed rate, whether or not earlier ones have a response yet.

    Latency counts from the scheduled time, so a stall of the server shows in full. A request
    without a response counts with the status NO_RESPONSE.
    """
    responses = Responses()
    started = time.perf_counter()

    async def send(due: float) -> None:
        status = NO_RESPONSE
        with suppress(OSError, asyncio.IncompleteReadError):
            async with connection(port) as (reader, writer):
                writer.write(request)
                status = await read_response(reader)
        responses.add(status, time.perf_counter() - due)

    tasks = []
    for number in range(int(per_second * seconds)):
        due = started + number / per_second
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        tasks.append(asyncio.create_task(send(due)))
    await asyncio.gather(*tasks)
    return responses


@asynccontextmanager
async def open_streams(port: int, requests: list[bytes]) -> AsyncIterator[list[int]]:
    """Keep one event stream open per request; yields the bytes that each has received so far."""
    received = [0] * len(requests)

    async def follow(number: int) -> None:
        async with connection(port) as (reader, writer):
            writer.write(requests[number])
            while chunk := await reader.read(65536):
                received[number] += len(chunk)

    tasks = [asyncio.create_task(follow(number)) for number in range(len(requests))]
    try:
        while not all(received):
            await asyncio.sleep(0.05)
        yield received
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@asynccontextmanager
async def connection(
    port: int,
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Open a connection and close it afterwards."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield reader, writer
    finally:
        writer.close()


async def read_response(reader: asyncio.StreamReader) -> int:
    """Read one whole response with a Content-Length; return its status."""
    return (await read_whole(reader))[0]


async def read_whole(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    """Read one whole response with a Content-Length, or without a body; return status and body."""
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    length = head.partition(b"content-length:")[2].split(b"\r\n", 1)[0]
    body = await reader.readexactly(int(length or 0))
    return int(head.split(b" ", 2)[1]), body
