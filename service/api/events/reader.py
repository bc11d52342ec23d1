"""Read the events of jobs from Redis, and encode each once for all streams that send it."""

import asyncio
from dataclasses import dataclass
from functools import partial

from fastapi.sse import format_sse_event
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisAway

from jobs import redis_keys
from jobs.state import JobState
from jobs.store.live import events
from jobs.store.live.events import JobEvent
from service.schemas.jobs import EventView, JobView


@dataclass(frozen=True, slots=True)
class EncodedEvent:
    """An event, and its encoding without the job."""

    event: JobEvent
    chunk: bytes

    @property
    def is_last(self) -> bool:
        """Whether the job sends no event after this one."""
        return self.event.kind == "state" and self.event.state.is_terminal


@dataclass(frozen=True, slots=True)
class EventBatch:
    """The events of a job after a given one, and its state; None if the job is gone."""

    state: JobState | None
    events: tuple[EncodedEvent, ...]


class EventReader:
    """Reads events; streams that ask for the same events while a read is under way share it."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._reads: dict[tuple[str, str], asyncio.Task[EventBatch]] = {}
        self._end: asyncio.Future[None]
        self.tasks: set[asyncio.Task[EventBatch]] = set()

    def start(self) -> None:
        """Attach the reader to the running event loop; call it before any `read`."""
        self._end = asyncio.get_running_loop().create_future()

    def end(self) -> None:
        """End all waiting for Redis, now and later."""
        if not self._end.done():
            self._end.set_result(None)

    async def read(self, job_id: str, after: str) -> EventBatch:
        """Read the events after the event `after`. Raises RedisError."""
        read = self._reads.get((job_id, after))
        if read is None or read.done():
            read = asyncio.create_task(self._read(job_id, after))
            self._reads[job_id, after] = read
            self.tasks.add(read)
            read.add_done_callback(partial(self._drop, (job_id, after)))
        # A separate task is not cancelled with the stream that asked first. Others may wait for it,
        # and redis-py loses connections of its pool when it is cancelled over and over.
        done, _ = await asyncio.wait((read, self._end), return_when=asyncio.FIRST_COMPLETED)
        if read not in done:
            raise RedisAway("this process ends and waits for no answer")
        return read.result()

    def forget(self, job_id: str) -> None:
        """Share no read that has begun before now: the job has new events, which it may miss."""
        for each in [each for each in self._reads if each[0] == job_id]:
            del self._reads[each]

    def _drop(self, key: tuple[str, str], read: asyncio.Task[EventBatch]) -> None:
        self.tasks.discard(read)
        if not read.cancelled():
            read.exception()  # marks it as retrieved, even if no stream waits for it any more
        if self._reads.get(key) is read:
            del self._reads[key]

    async def _read(self, job_id: str, after: str) -> EventBatch:
        async with self._redis.pipeline(transaction=False) as pipe:
            # The state is read first: if it is final, the events below include the last one.
            pipe.hmget(redis_keys.record(job_id), ["state", "delete_requested"])
            pipe.xrange(*events.range_after(job_id, after))
            (state, deleted), entries = await pipe.execute()
        if state is None or deleted is not None:
            return EventBatch(None, ())
        encoded = (EncodedEvent(event, encode(job_id, event)) for event in events.decode(entries))
        return EventBatch(JobState(state.decode()), tuple(encoded))


def encode(job_id: str, event: JobEvent, job: JobView | None = None) -> bytes:
    """Encode an event as a server-sent event, with the whole job if it is given."""
    view = EventView(
        id=job_id,
        state=event.state,
        attempts=event.attempts,
        at=event.at,
        progress=event.progress,
        preview=event.preview,
        job=job,
    )
    left_out = set() if event.kind == "preview" else {"preview"}
    if job is None:
        left_out.add("job")
    data = view.model_dump_json(exclude=left_out)
    return format_sse_event(event=event.kind, data_str=data, id=event.event_id)
