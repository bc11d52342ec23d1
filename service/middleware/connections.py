"""Bound the service's connections, and close those whose clients send or take nothing.

uvicorn closes a connection only between two requests. One that was opened and stays silent, sends
half a request, or takes no more of an answer would hold its descriptor for ever, and about a
thousand of them would keep everybody else out. Here every connection has a deadline for what it
waits for, and if there are too many, the one that has waited longest makes room for the new one.
"""

import ipaddress
import json
import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from service.auth.rate_limit import network_of

logger = logging.getLogger(__name__)

SHARES: Final = 10
"""One address may have 1/SHARES of the most connections, but at least SMALLEST_SHARE."""
SMALLEST_SHARE: Final = 20
PARTS: Final = 10
"""The connections are swept in so many parts."""
MOST_CLOSED: Final = 25
"""The most connections of a part that are closed in one sweep."""
SAID_EVERY_S: Final = 10.0
"""How often it is logged, in one line, how many connections were closed."""


class Phase(Enum):
    """What a connection waits for."""

    HEAD = "the head of a request"
    BODY = "the rest of a body"
    IDLE = "another request"
    ANSWER = "the service"
    READER = "a client that takes the answer"
    CLOSED = "a client that takes the rest of an answer"


@dataclass(frozen=True, slots=True)
class Deadlines:
    """How many seconds a connection may stay in each phase; a service may take any time."""

    head_s: float = 10.0
    body_s: float = 30.0
    idle_s: float = 65.0
    reader_s: float = 60.0
    closed_s: float = 10.0

    def of(self, phase: Phase) -> float:
        """Return the seconds for a phase."""
        return {
            Phase.HEAD: self.head_s,
            Phase.BODY: self.body_s,
            Phase.IDLE: self.idle_s,
            Phase.READER: self.reader_s,
            Phase.CLOSED: self.closed_s,
        }.get(phase, float("inf"))


class Connections:
    """The open connections of one process. Belongs to the event loop."""

    def __init__(
        self,
        most: int,
        deadlines: Deadlines | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Create an empty set.

        Args:
            most: how many connections may be open at a time.
            clock: tells the seconds; replaced in tests.
        """
        self.most = most
        self.share = max(SMALLEST_SHARE, most // SHARES)
        self.deadlines = deadlines or Deadlines()
        self._clock = clock
        self._open: dict[BoundedConnection, None] = {}  # oldest first
        self._by_address: Counter[str] = Counter()
        self._closed: Counter[str] = Counter()  # since it was last said, by reason
        self._said_at = -SAID_EVERY_S
        self._next_part = 0

    def __len__(self) -> int:
        return len(self._open)

    def protocol(self, **uvicorns: Any) -> "BoundedConnection":
        """Make the protocol of a new connection; uvicorn calls this."""
        return BoundedConnection(self, **uvicorns)

    def add(self, connection: "BoundedConnection") -> None:
        """Count a new connection; close another one, or else this one, if there are too many."""
        self._open[connection] = None
        connection.part = self._next_part = (self._next_part + 1) % PARTS
        self._by_address[connection.address] += 1
        connection.watch(self._clock())
        if not connection.is_shared and self._by_address[connection.address] > self.share:
            self._make_room(connection, lambda each: each.address == connection.address)
        elif len(self._open) > self.most:
            self._make_room(connection, lambda _: True)

    def remove(self, connection: "BoundedConnection") -> None:
        """Count a connection as closed."""
        if connection in self._open:
            del self._open[connection]
            self._by_address[connection.address] -= 1
            if not self._by_address[connection.address]:
                del self._by_address[connection.address]

    def sweep(self, part: int | None = None) -> None:
        """Close what is past its deadline.

        Args:
            part: one of PARTS, each to be swept about once a second, and not more than MOST_CLOSED
                of it. So thousands of connections that came together are not closed, and opened
                again, all at once, while others wait. None for all.
        """
        now = self._clock()
        closed_before = self._closed.total()
        for connection in [each for each in self._open if part in (None, each.part)]:
            if part is not None and self._closed.total() - closed_before >= MOST_CLOSED:
                break
            phase, since = connection.watch(now)
            if now - since >= self.deadlines.of(phase):
                self._closed[f"waited {self.deadlines.of(phase):g} s for {phase.value}"] += 1
                connection.give_up(phase)
        if self._closed and now - self._said_at >= SAID_EVERY_S:
            said = ", ".join(f"{count} {reason}" for reason, count in self._closed.items())
            left = sum(not each.transport.is_closing() for each in self._open)
            logger.warning("closed connections: %s; %d are open", said, left)
            self._closed.clear()
            self._said_at = now

    def _make_room(
        self, new: "BoundedConnection", among: Callable[["BoundedConnection"], bool]
    ) -> None:
        """Close the one of `among` that has waited longest for its client; else the new one."""
        now = self._clock()
        for each in self._open:
            if each is not new and among(each) and each.watch(now)[0] in (Phase.HEAD, Phase.IDLE):
                self._closed["made room for others"] += 1
                self.remove(each)
                each.transport.abort()
                return
        self._closed["found no room"] += 1
        self.remove(new)
        new.refuse(
            *(503, b"Service Unavailable", "too_many_connections"),
            "There are too many connections; close those that you do not use.",
        )


class BoundedConnection(H11Protocol):
    """uvicorn's connection, which `Connections` counts and may give up."""

    def __init__(self, connections: Connections, **uvicorns: Any) -> None:
        super().__init__(**uvicorns)
        self._bounds = connections
        self._seen: tuple[Phase, object] = (Phase.HEAD, None)
        self._since: float | None = None
        self._is_paused = False
        self.address = "-"
        self.is_shared = True
        self.part = 0

    def connection_made(self, transport: Any) -> None:
        """Count the connection."""
        super().connection_made(transport)
        self.address, self.is_shared = self._client()
        self._bounds.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop counting the connection."""
        self._bounds.remove(self)
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Note that the client takes less than it is sent."""
        self._is_paused = True
        super().pause_writing()

    def resume_writing(self) -> None:
        """Note that the client has taken what it was sent."""
        self._is_paused = False
        super().resume_writing()

    def watch(self, now: float) -> tuple[Phase, float]:
        """Return the phase and when it was first seen."""
        # With the request, or a client that sends many short ones would look like one that waits.
        seen = (self._phase(), self.cycle)
        if seen != self._seen or self._since is None:
            self._seen, self._since = seen, now
        return seen[0], self._since

    def give_up(self, phase: Phase) -> None:
        """Close the connection, with an answer if the client sent a part of a request."""
        has_begun = phase is Phase.HEAD and bool(self.conn.trailing_data[0])
        is_unanswered = phase is Phase.BODY and not self.cycle.response_started
        if has_begun or is_unanswered:
            self.refuse(
                *(408, b"Request Timeout", "request_timeout"),
                f"The request was not complete after {self._bounds.deadlines.of(phase):g} s.",
            )
        elif phase is Phase.IDLE:
            self.transport.close()
        else:
            self.transport.abort()

    def refuse(self, status: int, reason: bytes, code: str, detail: str) -> None:
        """Answer with a problem document, and close."""
        problem = {
            "type": f"urn:wan-hif8:problem:{code}",
            "title": reason.decode(),
            "status": status,
            "detail": detail,
            "code": code,
        }
        body = json.dumps(problem).encode()
        headers = [
            (b"content-type", b"application/problem+json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        if status == 503:
            headers.append((b"retry-after", b"5"))
        head = b"HTTP/1.1 %d %s\r\n" % (status, reason)
        lines = b"".join(b"%s: %s\r\n" % header for header in headers)
        self.transport.write(head + lines + b"\r\n" + body)
        self.transport.close()

    def _phase(self) -> Phase:
        if self.transport.is_closing():
            return Phase.CLOSED
        if self._is_paused:
            return Phase.READER
        if self.conn.their_state is h11.SEND_BODY:
            return Phase.BODY
        if self.conn.their_state is not h11.IDLE:
            return Phase.ANSWER
        return Phase.HEAD if self.cycle is None or self.conn.trailing_data[0] else Phase.IDLE

    def _client(self) -> tuple[str, bool]:
        """Return what the client is counted by, and whether many clients may share it."""
        address = self.client[0] if self.client else ""
        try:
            parsed = ipaddress.ip_address(address)
        except ValueError:  # a socket in the file system
            return address, True
        if isinstance(parsed, ipaddress.IPv6Address):
            parsed = parsed.ipv4_mapped or parsed
        # uvicorn's middleware knows the proxies whose X-Forwarded-For is believed.
        is_proxy = str(parsed) in getattr(self.app, "trusted_hosts", ())
        return network_of(address), parsed.is_loopback or is_proxy
