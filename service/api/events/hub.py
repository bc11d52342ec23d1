"""Wake the event streams of one service process when their jobs have new events.

While there are streams, one subscription to `redis_keys.EVENTS_CHANNEL` receives the ids of jobs
with new events, and wakes the streams of these jobs. Each stream then reads the job's events in
Redis, from the last event that it has sent. A message that is missed only delays events: streams
also read when their heartbeat is due, and whenever the subscription is restored after Redis was
down. So any number of processes can serve the same jobs, and none holds state about them.

Everything here belongs to the event loop. It is not safe to share between threads.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, cast

from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisAway
from redis.exceptions import RedisError
from starlette.concurrency import run_in_threadpool

from jobs import redis_keys
from jobs.errors import TooManyOwnStreams, TooManyStreams
from jobs.record import JobRecord
from jobs.redis_client import connect_async
from jobs.state import JobState
from jobs.store.queue_positions import QueuePosition
from service.api.events.reader import EventBatch, EventReader
from service.lookups.queue_positions import CachedQueuePositions

logger = logging.getLogger(__name__)

CONNECTIONS: Final = 16
"""The most connections to Redis."""
FIRST_RETRY_S: Final = 0.1
LAST_RETRY_S: Final = 2.0
"""The first and the longest pause before the subscription is tried again."""
SILENCE_S: Final = 5.0
"""After this long without a message, the subscription sends a ping. If nothing comes for as long
again, the connection counts as broken."""

WOKEN_AT_ONCE: Final = 8
"""The most streams that are woken at once; then other tasks of the event loop run for BETWEEN_S."""
BETWEEN_S: Final = 0.002

SHARES: Final = 10
"""One owner may have 1/SHARES of the most streams open, but at least SMALLEST_SHARE."""
SMALLEST_SHARE: Final = 10
RETRY_AFTER_S: Final = 10
"""Sent as Retry-After when an owner has that many open."""

AFTER_FAULT_S: Final = 2.0
"""The pause of a background task after an unexpected error."""

POSITIONS_EVERY_S: Final = 1.5
"""How often the queue positions of all followed, queued jobs are read, in one call."""


class Follower:
    """The hub's record of one event stream.

    Attributes:
        owner: the owner in whose share of the streams it is counted; None if in nobody's.
        changed: set whenever there may be something new to send.
        is_queued: whether the job waits in a queue, so that the hub reads its position.
        queue_position: the position that was read last.
    """

    def __init__(self, job: JobRecord, owner: str | None = None) -> None:
        self.job = job
        self.owner = owner
        self.changed = asyncio.Event()
        self.is_queued = job.state is JobState.QUEUED
        self.queue_position: QueuePosition | None = None


class EventHub:
    """Wakes streams from `start` to `stop`; at most `max_streams` may be open at a time."""

    def __init__(self, url: str, positions: CachedQueuePositions, max_streams: int) -> None:
        self._redis: Redis = connect_async(url, CONNECTIONS)
        self._reader = EventReader(self._redis)
        self._positions = positions
        self._max_streams = max_streams
        self._share = max(SMALLEST_SHARE, max_streams // SHARES)
        self._streams_by_owner: Counter[str] = Counter()
        self._followers: dict[str, set[Follower]] = {}
        self._due: dict[Follower, None] = {}  # to be woken, in this order
        self._any_followers = asyncio.Event()
        self._any_due = asyncio.Event()
        self._any_queued = asyncio.Event()
        self._tasks: set[asyncio.Task[Any]] = set()
        self.is_closing = False

    @property
    def followers(self) -> int:
        """The number of open streams."""
        return sum(map(len, self._followers.values()))

    def start(self) -> None:
        """Start the background tasks in the running event loop."""
        self._reader.start()
        for work in (self._listen, self._wake_those_due, self._look_up_positions):
            self._spawn(work)

    def end_streams(self) -> None:
        """End every stream now; their clients will reconnect to another process."""
        self.is_closing = True
        self._reader.end()
        for followers in self._followers.values():
            for follower in followers:
                follower.changed.set()

    async def stop(self) -> None:
        """End all streams and background tasks, and close the connections."""
        self.end_streams()
        left = self._tasks | self._reader.tasks
        while left:
            # Repeated, because a Redis client that is just connecting may swallow a cancellation.
            for task in left:
                task.cancel()
            _, left = await asyncio.wait(left, timeout=0.1)
        await self._redis.aclose()

    @contextmanager
    def follow(self, follower: Follower) -> Iterator[None]:
        """Count a stream as open for the length of the block, and wake it on new events of its job.

        Raises:
            TooManyStreams: the process has as many streams open as it may have.
            TooManyOwnStreams: the owner has as many streams open as one owner may have.
        """
        self._check_limits(follower.owner)
        job, owner = follower.job, follower.owner
        followers = self._followers.setdefault(job.id, set())
        followers.add(follower)
        self._any_followers.set()
        if owner is not None:
            self._streams_by_owner[owner] += 1
        if follower.is_queued:
            self._any_queued.set()
        try:
            yield
        finally:
            followers.discard(follower)
            if owner is not None:
                self._streams_by_owner[owner] -= 1
                self._streams_by_owner += Counter()  # drops what is 0
            self._due.pop(follower, None)
            if not followers and self._followers.get(job.id) is followers:
                del self._followers[job.id]
            if not self._followers:
                self._any_followers.clear()

    def _check_limits(self, owner: str | None) -> None:
        if self.followers >= self._max_streams:
            raise TooManyStreams(
                f"This process has {self._max_streams} event streams open, and that is the most; "
                f"come back later, or ask for the job now and then."
            )
        if owner is not None and self._streams_by_owner[owner] >= self._share:
            raise TooManyOwnStreams(
                f"You have {self._share} event streams open at this process, and that is the most "
                f"for one key; close one, or ask for the job now and then.",
                retry_after_s=RETRY_AFTER_S,
            )

    def note_state(self, follower: Follower, state: JobState) -> None:
        """Record the job's state; its queue position is read only while it is queued."""
        follower.is_queued = state is JobState.QUEUED
        if follower.is_queued:
            self._any_queued.set()
        else:
            follower.queue_position = None

    async def read(self, job_id: str, after: str) -> EventBatch:
        """Read the events after the event `after`. Raises RedisError."""
        return await self._reader.read(job_id, after)

    async def _listen(self) -> None:
        """Subscribe to new events while there are streams; otherwise messages would waste time."""
        retry_s = FIRST_RETRY_S
        while True:
            if not self._followers:
                retry_s = FIRST_RETRY_S
                await self._any_followers.wait()
            try:
                async with cast("Any", self._redis).pubsub() as subscription:
                    await subscription.subscribe(redis_keys.EVENTS_CHANNEL)
                    async for job_id in _messages(subscription):
                        if job_id is None:
                            if retry_s > FIRST_RETRY_S:
                                logger.info("following events again")
                            retry_s = FIRST_RETRY_S
                        for each in list(self._followers) if job_id is None else (job_id,):
                            self._reader.forget(each)
                            self._wake(*self._followers.get(each, ()))
                        if not self._followers:
                            break  # checked only when a message comes, which is soon enough
            except (RedisError, OSError) as error:
                if retry_s == FIRST_RETRY_S:
                    logger.warning("Events cannot be followed for now: %r", error)
                await asyncio.sleep(retry_s)
                retry_s = min(2 * retry_s, LAST_RETRY_S)

    async def _look_up_positions(self) -> None:
        while True:
            await self._any_queued.wait()
            waiting = {
                f.job.id: f.job for each in self._followers.values() for f in each if f.is_queued
            }
            if not waiting:
                self._any_queued.clear()
                continue
            queued = [job.model_copy(update={"state": JobState.QUEUED}) for job in waiting.values()]
            positions = await run_in_threadpool(self._positions.of, queued)
            for job_id, position in positions.items():
                for follower in self._followers.get(job_id, ()):
                    if follower.queue_position != position:
                        follower.queue_position = position
                        self._wake(follower)
            await asyncio.sleep(POSITIONS_EVERY_S)

    async def _wake_those_due(self) -> None:
        """Wake a few streams at a time, so that requests are handled between them."""
        while True:
            await self._any_due.wait()
            for follower in list(self._due)[:WOKEN_AT_ONCE]:
                del self._due[follower]
                follower.changed.set()
            if not self._due:
                self._any_due.clear()
            await asyncio.sleep(BETWEEN_S)

    def _wake(self, *followers: Follower) -> None:
        self._due.update(dict.fromkeys(followers))
        if self._due:
            self._any_due.set()

    def _spawn(self, work: Callable[[], Awaitable[None]]) -> None:
        task = asyncio.create_task(keep_doing(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def keep_doing(work: Callable[[], Awaitable[None]]) -> None:
    """Repeat `work` for ever, whatever it raises: if a task ended, streams would be late."""
    while True:
        try:
            await work()
        except Exception:
            logger.exception("Following events met an unexpected error, and goes on.")
        await asyncio.sleep(AFTER_FAULT_S)


async def _messages(subscription: Any) -> AsyncIterator[str | None]:
    """Yield None once the subscription is confirmed, then ids of jobs with new events, for ever.

    Raises:
        RedisError, OSError: the connection broke.
    """
    pinged = False
    while True:
        message = await subscription.get_message(timeout=SILENCE_S)
        if message is None:
            if pinged:
                raise RedisAway(f"no sign of life for {2 * SILENCE_S:.0f} s")
            await subscription.ping()
            pinged = True
            continue
        pinged = False
        if message["type"] == "subscribe":
            yield None
        elif message["type"] == "message":
            # Any client of Redis may publish, so the data may not be an id.
            yield message["data"].decode(errors="replace")
