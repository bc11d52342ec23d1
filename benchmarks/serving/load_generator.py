"""A load generator that costs little: HTTP/1.1 over kept connections, one process, no library.

A comfortable client would use more of the two cores than the server under test, and then the client
is what is measured. This one sends bytes that were made beforehand and reads what comes back.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field


@dataclass(slots=True)
class Answers:
    """What the clients of one run were told, and how long each answer took in seconds."""

    seconds: list[float] = field(default_factory=list)
    statuses: dict[int, int] = field(default_factory=dict)

    def add(self, status: int, seconds: float) -> None:
        self.statuses[status] = self.statuses.get(status, 0) + 1
        self.seconds.append(seconds)


def request_bytes(method: str, path: str, headers: dict[str, str], body: bytes = b"") -> bytes:
    """One request, ready to send."""
    lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


async def hammer(port: int, request: bytes, clients: int, seconds: float) -> Answers:
    """Have `clients` send the same request again and again, each as soon as it is answered."""
    answers = Answers()
    end = time.perf_counter() + seconds

    async def client() -> None:
        async with connection(port) as (reader, writer):
            while time.perf_counter() < end:
                started = time.perf_counter()
                writer.write(request)
                status = await read_answer(reader)
                answers.add(status, time.perf_counter() - started)

    await asyncio.gather(*(client() for _ in range(clients)))
    return answers


async def ask_regularly(port: int, request: bytes, per_second: float, seconds: float) -> Answers:
    """Send a request at each tick, whether or not earlier ones are answered; late answers count
    from the tick, so a stall is seen in full."""
    answers = Answers()
    started = time.perf_counter()

    async def ask(due: float) -> None:
        async with connection(port) as (reader, writer):
            writer.write(request)
            answers.add(await read_answer(reader), time.perf_counter() - due)

    tasks = []
    for number in range(int(per_second * seconds)):
        due = started + number / per_second
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        tasks.append(asyncio.create_task(ask(due)))
    await asyncio.gather(*tasks)
    return answers


@asynccontextmanager
async def streams(port: int, requests: list[bytes]) -> AsyncIterator[list[int]]:
    """Hold one open event stream per request; yields the bytes each has received so far."""
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
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield reader, writer
    finally:
        writer.close()


async def read_answer(reader: asyncio.StreamReader) -> int:
    """Read one whole answer with a Content-Length; returns its status."""
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    length = head.partition(b"content-length:")[2].split(b"\r\n", 1)[0]
    await reader.readexactly(int(length))
    return int(head.split(b" ", 2)[1])
