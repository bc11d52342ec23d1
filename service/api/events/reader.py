"""Reads the events of jobs for many streams at once, and puts them on the wire once for all."""

import asyncio
from dataclasses import dataclass
from functools import partial

from fastapi.sse import format_sse_event
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisAway

from jobs import redis_keys
from jobs.state import JobState
from jobs.store import events
from jobs.store.events import JobEvent
from service.schemas.jobs import EventView, JobView


@dataclass(frozen=True, slots=True)
class EncodedEvent:
    """An event, and what is sent of it where nothing is added."""

    event: JobEvent
    chunk: bytes

    @property
    def ends(self) -> bool:
        return self.event.kind == "state" and self.event.state.is_terminal


@dataclass(frozen=True, slots=True)
class EventBatch:
    """What happened to a job after some event; `state` is None when the job is gone."""

    state: JobState | None
    told: tuple[EncodedEvent, ...]


class EventReader:
    """Shares each read among all who ask for the same while it is under way."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._reads: dict[tuple[str, str], asyncio.Task[EventBatch]] = {}
        self._end: asyncio.Future[None]
        self.tasks: set[asyncio.Task[EventBatch]] = set()

    def start(self) -> None:
        self._end = asyncio.get_running_loop().create_future()

    def end(self) -> None:
        """Let nobody wait for Redis any more."""
        if not self._end.done():
            self._end.set_result(None)

    async def read(self, job_id: str, after: str) -> EventBatch:
        """Read what happened after the event `after`. Raises RedisError."""
        read = self._reads.get((job_id, after))
        if read is None or read.done():
            read = asyncio.create_task(self._read(job_id, after))
            self._reads[job_id, after] = read
            self.tasks.add(read)
            read.add_done_callback(partial(self._drop, (job_id, after)))
        # A task of its own is not cancelled with the stream that asked first: others may wait for
        # it, and redis-py loses connections of its pool to cancellations that come over and over.
        done, _ = await asyncio.wait((read, self._end), return_when=asyncio.FIRST_COMPLETED)
        if read not in done:
            raise RedisAway("this process ends and waits for no answer")
        return read.result()

    def forget(self, job_id: str) -> None:
        """There is something new: who asks from now on needs a read that begins now."""
        for each in [each for each in self._reads if each[0] == job_id]:
            del self._reads[each]

    def _drop(self, asked: tuple[str, str], read: asyncio.Task[EventBatch]) -> None:
        self.tasks.discard(read)
        if not read.cancelled():
            read.exception()  # everybody who asked may be gone
        if self._reads.get(asked) is read:
            del self._reads[asked]

    async def _read(self, job_id: str, after: str) -> EventBatch:
        async with self._redis.pipeline(transaction=False) as pipe:
            # The state first: events up to an end that is seen here are seen below.
            pipe.hmget(redis_keys.record(job_id), ["state", "delete_requested"])
            pipe.xrange(*events.range_after(job_id, after))
            (state, deleted), entries = await pipe.execute()
        if state is None or deleted is not None:
            return EventBatch(None, ())
        told = (EncodedEvent(event, encode(job_id, event)) for event in events.decode(entries))
        return EventBatch(JobState(state.decode()), tuple(told))


def encode(job_id: str, event: JobEvent, job: JobView | None = None) -> bytes:
    """Put an event on the wire, with the whole job if it is given."""
    view = EventView(
        id=job_id,
        state=event.state,
        attempts=event.attempts,
        at=event.at,
        progress=event.progress,
        job=job,
    )
    data = view.model_dump_json(exclude={"job"} if job is None else None)
    return format_sse_event(event=event.kind, data_str=data, id=event.event_id)
