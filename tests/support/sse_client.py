"""Read event streams: one answer, or like a browser's EventSource, which reconnects."""

import json
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx2

PATIENCE = httpx2.Timeout(30, connect=10)
PAUSE_S = 0.1
MOST_BROKEN = 100


@dataclass
class Sent:
    """One event, or one block of comments: the lines between two empty ones."""

    event: str = ""
    id: str = ""
    retry: str = ""
    comments: list[str] = field(default_factory=list)
    data: Any = None

    @property
    def kind_and_state(self) -> tuple[str, str]:
        return self.event, self.data["state"]


def parse(lines: Iterable[str]) -> Iterator[Sent]:
    """Parse server-sent events by the standard; an incomplete block at the end is dropped."""
    sent = Sent()
    for line in lines:
        if not line:
            yield sent
            sent = Sent()
            continue
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if not name:
            sent.comments.append(value)
        elif name == "data":
            sent.data = json.loads(value)
        else:
            assert name in ("event", "id", "retry")
            setattr(sent, name, value)


@contextmanager
def stream(
    url: str, job_id: str, after: str | None = None, **parameters: str
) -> Iterator[tuple[httpx2.Response, Iterator[Sent]]]:
    """Open a stream. Leaving the block early disconnects, like a client that goes away."""
    headers = {} if after is None else {"Last-Event-ID": after}
    with (
        httpx2.Client(trust_env=False, verify=False, timeout=PATIENCE) as client,
        client.stream(
            "GET", f"{url}/jobs/{job_id}/events", headers=headers, params=parameters
        ) as answer,
    ):
        yield answer, parse(answer.iter_lines())


def read(url: str, job_id: str, after: str | None = None, **parameters: str) -> list[Sent]:
    """Read a stream to its end."""
    with stream(url, job_id, after, **parameters) as (answer, sent):
        assert answer.status_code == 200
        return [each for each in sent if each.event]


class EventSource(threading.Thread):
    """Follows a job like a browser: reconnects with the last id until the answer is 204.

    Each connection goes to the next of `urls`; `cut_after` ends each after so many events.
    """

    def __init__(self, urls: list[str], job_id: str, cut_after: int | None = None) -> None:
        super().__init__(daemon=True)
        self._urls = urls
        self._job_id = job_id
        self._cut_after = cut_after
        self._last_id: str | None = None
        self._broken = 0
        self.connections = 0
        self.comments = 0
        self.queue: list[dict[str, Any]] = []
        self.sent: list[Sent] = []
        self.fault: BaseException | None = None

    def run(self) -> None:
        try:
            while self._connect():
                pass
        except BaseException as error:
            self.fault = error
            raise

    def finish(self, limit_s: float = 30) -> list[Sent]:
        """Wait for the end, and return the events that came, without those of kind `queue`."""
        self.join(limit_s)
        assert not self.is_alive(), f"open after {[each.kind_and_state for each in self.sent]}"
        assert self.fault is None
        return self.sent

    def _connect(self) -> bool:
        url = self._urls[self.connections % len(self._urls)]
        self.connections += 1
        try:
            with stream(url, self._job_id, self._last_id) as (answer, sent):
                if answer.status_code == 204:
                    return False
                assert answer.status_code == 200, answer.read()
                self._take(sent)
        except httpx2.TransportError as error:
            # The connection broke, or the server is gone. If it stays gone, the thread must end:
            # it would otherwise reconnect during all later tests.
            self._broken += 1
            time.sleep(PAUSE_S)
            if self._broken > MOST_BROKEN:
                self.fault = error
                return False
        else:
            self._broken = 0
        return True

    def _take(self, stream: Iterator[Sent]) -> None:
        taken = 0
        for sent in stream:
            self.comments += len(sent.comments)
            if sent.event == "queue":
                self.queue.append(sent.data)
            elif sent.event:
                self.sent.append(sent)
                self._last_id = sent.id
                taken += 1
            if taken == self._cut_after:
                return
