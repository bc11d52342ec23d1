"""Submit jobs to a deployment that is being broken, and check afterwards what became of them."""

from __future__ import annotations

import collections
import hashlib
import statistics
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import httpx
from redis import Redis

from benchmarks.cluster.supervisor import Supervisor
from benchmarks.report import Row
from deploy.local.cluster import ENDED
from deploy.local.waiting import wait_until

SHORT: Final = {"prompt": "a small red circle", "num_frames": 5, "num_inference_steps": 2}
LONG: Final = {"prompt": "a large blue ring", "num_frames": 17, "num_inference_steps": 20}
"""Jobs for the worker that is cut off: long enough to be in hand when it happens."""

EVERY: Final = 10
"""One job in so many is long."""

MOST_OPEN: Final = 8
BEHIND_A_FAULT: Final = frozenset({502, 503, 504})


class Target(Protocol):
    """What jobs are submitted to."""

    client: httpx.Client
    redis: Redis
    supervisor: Supervisor

    @property
    def url(self) -> str:
        """The base URL of the service or its proxy."""


@dataclass(slots=True)
class Accepted:
    """The accepted jobs: when each was answered 202, and what callers have seen of it."""

    at: dict[str, float] = field(default_factory=dict)
    ended: dict[str, tuple[float, str]] = field(default_factory=dict)
    undone: list[str] = field(default_factory=list)
    repeated: int = 0

    def rows(self) -> Iterator[Row]:
        """Yield what callers noticed."""
        waits = [self.ended[job_id][0] - at for job_id, at in self.at.items()]
        yield Row("ends that callers saw and a fault undid", float(len(self.undone)), "")
        yield Row("requests repeated by the caller", float(self.repeated), "")
        yield Row("accepted to seen ended, median", round(statistics.median(waits), 2), "s")
        yield Row("accepted to seen ended, longest", round(max(waits), 2), "s")


class Caller:
    """Submits jobs in one thread, no more than are allowed, and looks at them in another."""

    def __init__(self, target: Target) -> None:
        self.seen = Accepted()
        self.error: BaseException | None = None
        self._target = target
        self._allowed = 0
        self._done = threading.Event()
        self._threads = [
            threading.Thread(target=self._repeat, args=(work,), daemon=True)
            for work in (self._submit, self._look)
        ]

    def start(self) -> None:
        """Start both threads."""
        for each in self._threads:
            each.start()

    def allow(self, jobs: int) -> None:
        """Allow so many more jobs."""
        self._allowed += jobs

    def finish(self, limit_s: float) -> None:
        """Wait until all that is allowed is accepted and has ended."""
        wait_until(self._has_finished, limit_s, "all jobs end", self._target.supervisor.logs)
        self._done.set()
        for each in self._threads:
            each.join()

    def _has_finished(self) -> bool:
        self.raise_error()
        return len(self.seen.at) == len(self.seen.ended) == self._allowed

    def raise_error(self) -> None:
        """Raise what has ended a thread."""
        if self.error is not None:
            raise self.error

    def _repeat(self, work: Callable[[], None]) -> None:
        try:
            while not self._done.wait(0.2):
                work()
        except BaseException as error:  # noqa: BLE001  # the main thread raises it
            self.error = error

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        """Send a request until it is answered by other than a sign of a fault."""
        until = time.monotonic() + 180
        while True:
            try:
                answer = self._target.client.request(method, self._target.url + path, **options)
                if answer.status_code not in BEHIND_A_FAULT:
                    return answer
                what = str(answer.status_code)
            except httpx.TransportError as error:
                what = repr(error)
            if time.monotonic() > until:
                raise TimeoutError(f"no answer to {method} {path}: {what}")
            self.seen.repeated += 1
            time.sleep(0.2)

    def _submit(self) -> None:
        number = len(self.seen.at)
        if number >= self._allowed or number - len(self.seen.ended) >= MOST_OPEN:
            return
        kind = LONG if number % EVERY == 0 else SHORT
        body = {**kind, "prompt": f"{kind['prompt']}, take {number}", "seed": number}
        key = {"Idempotency-Key": uuid.uuid4().hex}
        answer = self.request("POST", "/generate", json=body, headers=key)
        assert answer.status_code == 202, answer.text
        self.seen.at[answer.json()["id"]] = time.monotonic()

    def _look(self) -> None:
        for job_id in list(self.seen.at):
            if job_id in self.seen.ended and time.monotonic() > self.seen.ended[job_id][0] + 60:
                continue
            answer = self.request("GET", f"/jobs/{job_id}")
            state = answer.json()["state"] if answer.status_code == 200 else "gone"
            if state in ENDED:
                self.seen.ended.setdefault(job_id, (time.monotonic(), state))
            elif job_id in self.seen.ended:
                self.seen.undone.append(job_id)
                del self.seen.ended[job_id]


@dataclass(slots=True)
class Verdict:
    """What became of the accepted jobs."""

    states: collections.Counter[str] = field(default_factory=collections.Counter)
    attempts: collections.Counter[int] = field(default_factory=collections.Counter)
    lost: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    uninvited: int = 0

    @property
    def is_bad(self) -> bool:
        """Whether a bound is broken."""
        found = (self.lost, self.doubled, self.failed, self.broken, self.uninvited)
        return any(found)

    def rows(self) -> Iterator[Row]:
        """Yield what has a bound."""
        yield Row("jobs lost (bound 0)", float(len(self.lost)), "")
        yield Row("jobs that ended twice (bound 0)", float(len(self.doubled)), "")
        yield Row("jobs that failed (bound 0)", float(len(self.failed)), "")
        yield Row("videos that are not whole (bound 0)", float(len(self.broken)), "")
        yield Row("jobs that nobody asked for (bound 0)", float(self.uninvited), "")


def check(target: Target, caller: Caller) -> Verdict:
    """Look at every accepted job, and for jobs that nobody asked for."""
    verdict = Verdict()
    for job_id in caller.seen.at:
        answer = caller.request("GET", f"/jobs/{job_id}")
        job: dict[str, Any] = answer.json()
        if answer.status_code != 200 or job["state"] not in ENDED:
            verdict.lost.append(job_id)
            continue
        verdict.states[job["state"]] += 1
        verdict.attempts[job["attempts"]] += 1
        entries: Any = target.redis.xrange(f"wan:events:{job_id}")
        ends = [each[b"state"].decode() for _, each in entries if each[b"state"].decode() in ENDED]
        if ends != [job["state"]]:
            verdict.doubled.append(job_id)
        if job["state"] != "succeeded":
            verdict.failed.append(job_id)
            continue
        content = caller.request("GET", f"/jobs/{job_id}/video.mp4").content
        if hashlib.sha256(content).hexdigest() != job["video"]["sha256"]:
            verdict.broken.append(job_id)
    records = {key.decode().rpartition(":")[2] for key in target.redis.scan_iter("wan:job:*")}
    verdict.uninvited = len(records - set(caller.seen.at))
    return verdict
