"""What a service process does for all its event streams together.

While there are streams, one subscription to `keys.EVENTS_CHANNEL` wakes those of the job that has
news; each then reads the job's stream in Redis after the last event it has sent. A message that is
missed costs nothing but time: streams also look when their heartbeat is due, and whenever the
subscription is back after Redis was away. So any number of processes serve the same jobs, and none
remembers any.

Everything here belongs to the event loop, and none of it is safe to share between threads.
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
FIRST_RETRY_S: Final = 0.1
LAST_RETRY_S: Final = 2.0
SILENCE_S: Final = 5.0
"""A subscription that says nothing for so long is asked for a sign of life, and given up if none
comes in as long again."""

WOKEN_AT_ONCE: Final = 8
BETWEEN_S: Final = 0.002

SHARES: Final = 10
"""An owner may have this part of all streams, so that one alone leaves room for others."""
SMALLEST_SHARE: Final = 10
RETRY_AFTER_S: Final = 10

AFTER_FAULT_S: Final = 2.0
"""How long one of the tasks rests after a fault of its own before it goes on."""

PLACES_EVERY_S: Final = 1.5
"""How often the places of the waiting jobs that are followed are looked up, all at once."""


class Follower:
    """One stream: `changed` is set whenever there may be something new to send.

    `owner` is whose share of the streams it is counted against, if against anybody's.
    """

    def __init__(self, job: JobRecord, owner: str | None = None) -> None:
        self.job = job
        self.owner = owner
        self.changed = asyncio.Event()
        self.waits = job.state is JobState.QUEUED
        self.place: QueuePosition | None = None


class EventHub:
    """Runs from `start` to `stop`; `most` streams may be open at a time."""

    def __init__(self, url: str, places: CachedQueuePositions, most: int) -> None:
        self._redis: Redis = connect_async(url, CONNECTIONS)
        self._reader = EventReader(self._redis)
        self._places = places
        self._most = most
        self._share = max(SMALLEST_SHARE, most // SHARES)
        self._of_owner: Counter[str] = Counter()
        self._followers: dict[str, set[Follower]] = {}
        self._due: dict[Follower, None] = {}
        self._someone_follows = asyncio.Event()
        self._someone_is_due = asyncio.Event()
        self._someone_waits = asyncio.Event()
        self._tasks: set[asyncio.Task[Any]] = set()
        self.is_closing = False

    @property
    def followers(self) -> int:
        return sum(map(len, self._followers.values()))

    def start(self) -> None:
        self._reader.start()
        for work in (self._listen, self._wake_those_due, self._look_up_places):
            self._spawn(work)

    def end_streams(self) -> None:
        """Let every stream end now; their clients come back to another process."""
        self.is_closing = True
        self._reader.end()
        for followers in self._followers.values():
            for follower in followers:
                follower.changed.set()

    async def stop(self) -> None:
        self.end_streams()
        left = self._tasks | self._reader.tasks
        while left:
            # Again and again: a client that is just connecting may swallow a cancellation.
            for task in left:
                task.cancel()
            _, left = await asyncio.wait(left, timeout=0.1)
        await self._redis.aclose()

    @contextmanager
    def follow(self, follower: Follower) -> Iterator[None]:
        """Count a stream as open, and wake it when its job has news.

        Raises:
            TooManyStreams: as many as may be are open.
            TooManyOwnStreams: as many as its owner may have are open.
        """
        self._check_room(follower.owner)
        job, owner = follower.job, follower.owner
        followers = self._followers.setdefault(job.id, set())
        followers.add(follower)
        self._someone_follows.set()
        if owner is not None:
            self._of_owner[owner] += 1
        if follower.waits:
            self._someone_waits.set()
        try:
            yield
        finally:
            followers.discard(follower)
            if owner is not None:
                self._of_owner[owner] -= 1
                self._of_owner += Counter()  # drops what is 0
            self._due.pop(follower, None)
            if not followers and self._followers.get(job.id) is followers:
                del self._followers[job.id]
            if not self._followers:
                self._someone_follows.clear()

    def _check_room(self, owner: str | None) -> None:
        if self.followers >= self._most:
            raise TooManyStreams(
                f"This process has {self._most} event streams open, and that is the most; come "
                f"back later, or ask for the job now and then."
            )
        if owner is not None and self._of_owner[owner] >= self._share:
            raise TooManyOwnStreams(
                f"You have {self._share} event streams open at this process, and that is the most "
                f"for one key; close one, or ask for the job now and then.",
                retry_after_s=RETRY_AFTER_S,
            )

    def note_state(self, follower: Follower, state: JobState) -> None:
        """Take notice of whether the job waits for a worker, and its place is of interest."""
        follower.waits = state is JobState.QUEUED
        if follower.waits:
            self._someone_waits.set()
        else:
            follower.place = None

    async def read(self, job_id: str, after: str) -> EventBatch:
        """Read what happened after the event `after`. Raises RedisError."""
        return await self._reader.read(job_id, after)

    async def _listen(self) -> None:
        """Keep a subscription as long as somebody follows: without, news only costs time."""
        retry_s = FIRST_RETRY_S
        while True:
            if not self._followers:
                retry_s = FIRST_RETRY_S
                await self._someone_follows.wait()
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
                            break  # heard of at the next message, which is soon enough
            except (RedisError, OSError) as error:
                if retry_s == FIRST_RETRY_S:
                    logger.warning("Events cannot be followed for now: %r", error)
                await asyncio.sleep(retry_s)
                retry_s = min(2 * retry_s, LAST_RETRY_S)

    async def _look_up_places(self) -> None:
        while True:
            await self._someone_waits.wait()
            waiting = {
                f.job.id: f.job for each in self._followers.values() for f in each if f.waits
            }
            if not waiting:
                self._someone_waits.clear()
                continue
            queued = [job.model_copy(update={"state": JobState.QUEUED}) for job in waiting.values()]
            places = await run_in_threadpool(self._places.of, queued)
            for job_id, place in places.items():
                for follower in self._followers.get(job_id, ()):
                    if follower.place != place:
                        follower.place = place
                        self._wake(follower)
            await asyncio.sleep(PLACES_EVERY_S)

    async def _wake_those_due(self) -> None:
        """Wake a few at a time: requests come in between, however many streams have news."""
        while True:
            await self._someone_is_due.wait()
            for follower in list(self._due)[:WOKEN_AT_ONCE]:
                del self._due[follower]
                follower.changed.set()
            if not self._due:
                self._someone_is_due.clear()
            await asyncio.sleep(BETWEEN_S)

    def _wake(self, *followers: Follower) -> None:
        self._due.update(dict.fromkeys(followers))
        if self._due:
            self._someone_is_due.set()

    def _spawn(self, work: Callable[[], Awaitable[None]]) -> None:
        task = asyncio.create_task(keep_doing(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def keep_doing(work: Callable[[], Awaitable[None]]) -> None:
    """No fault ends it: without any one of its tasks, the streams would be late for good."""
    while True:
        try:
            await work()
        except Exception:
            logger.exception("Following events met an unexpected error, and goes on.")
        await asyncio.sleep(AFTER_FAULT_S)


async def _messages(subscription: Any) -> AsyncIterator[str | None]:
    """Yield None once the subscription stands, then the ids of jobs with news, for ever.

    Raises:
        RedisError, OSError: it broke.
    """
    asked = False
    while True:
        message = await subscription.get_message(timeout=SILENCE_S)
        if message is None:
            if asked:
                raise RedisAway(f"no sign of life for {2 * SILENCE_S:.0f} s")
            await subscription.ping()
            asked = True
            continue
        asked = False
        if message["type"] == "subscribe":
            yield None
        elif message["type"] == "message":
            # Anybody may publish, so it may be no id at all.
            yield message["data"].decode(errors="replace")
