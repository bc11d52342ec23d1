"""Send the events of one job as server-sent events.

Only the wire format is FastAPI's (`fastapi.sse`). A route with FastAPI's response class is a
generator that cannot answer 204, costs two more tasks for each stream, and leaves it undefined who
ends a stream. `sse-starlette` has more options, but patches uvicorn to notice the end of the
process; here `service/server.py` notifies the hub.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any, ClassVar, Final, cast

from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event
from redis.exceptions import RedisError
from starlette.concurrency import run_in_threadpool
from starlette.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from jobs.errors import JobNotFound
from jobs.state import JobState
from jobs.store.queue_positions import QueuePosition
from service.api.events.hub import EventHub, Follower
from service.api.events.reader import encode
from service.schemas.jobs import JobView, QueueView

logger = logging.getLogger(__name__)

RECONNECT_MS: Final = 2000
"""How long a client waits before it reconnects after its connection broke."""

REDIS_RETRY_S: Final = 1.0
"""How long a stream waits before it reads again while Redis is down."""

HEADERS: Final = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


class EventStream(StreamingResponse):
    """Sends the events of a job after the event `after`, past and new ones, until the job ends.

    Ends early if the job is deleted or the process ends. Raises TooManyStreams and
    TooManyOwnStreams before anything is sent.
    """

    media_type = "text/event-stream"

    send_s: ClassVar = 60.0
    """A client is dropped that takes nothing for this long while the network's buffers are full."""

    def __init__(
        self,
        hub: EventHub,
        follower: Follower,
        after: str,
        heartbeat_s: float,
        view: Callable[[], JobView],
    ) -> None:
        """Prepare the response.

        Args:
            heartbeat_s: after so many seconds without an event, a comment is sent.
            view: makes the JSON of the job as it is now.
        """
        super().__init__(self._chunks(), headers=HEADERS)
        self._hub = hub
        self._follower = follower
        self._job = follower.job
        self._after = after
        self._heartbeat_s = heartbeat_s
        self._view = view
        self._sent_position: QueuePosition | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Here and not in the generator, which may never be resumed after the client disconnects.
        with self._hub.follow(self._follower):
            await super().__call__(scope, receive, send)

    async def stream_response(self, send: Send) -> None:
        """Send the stream; give up on a client that takes longer than `send_s` for one message."""

        async def send_in_time(message: Message) -> None:
            async with asyncio.timeout(self.send_s):
                await send(message)

        chunks = cast("Any", self.body_iterator)
        try:
            await super().stream_response(send_in_time)
        except TimeoutError:
            # The server notices that the answer is incomplete, and closes the connection.
            logger.warning("An event stream is given up: its client takes nothing any more.")
        finally:
            await chunks.aclose()

    async def _chunks(self) -> AsyncIterator[bytes]:
        yield format_sse_event(retry=RECONNECT_MS)
        while not self._hub.is_closing:
            self._follower.changed.clear()
            wait_s = self._heartbeat_s
            try:
                chunks, is_over = await self._new_chunks()
            except (RedisError, OSError):
                chunks, is_over, wait_s = [], False, min(wait_s, REDIS_RETRY_S)
            if chunks:
                yield b"".join(chunks)
            if is_over:
                return
            try:
                async with asyncio.timeout(wait_s):
                    await self._follower.changed.wait()
            except TimeoutError:
                yield KEEPALIVE_COMMENT

    async def _new_chunks(self) -> tuple[list[bytes], bool]:
        """Return what to send now, and whether the stream ends after it."""
        batch = await self._hub.read(self._job.id, self._after)
        if batch.state is None:
            return [], True
        self._hub.note_state(self._follower, batch.state)
        chunks: list[bytes] = []
        for encoded in batch.events:
            if encoded.is_last:
                try:
                    view = await run_in_threadpool(self._view)
                except JobNotFound:
                    return chunks, True
                return [*chunks, encode(self._job.id, encoded.event, view)], True
            chunks.append(encoded.chunk)
        if batch.events:
            self._after = batch.events[-1].event.event_id
        position = self._follower.queue_position
        if batch.state is JobState.QUEUED and position not in (None, self._sent_position):
            assert position is not None, "checked in the line before"
            self._sent_position = position
            data = QueueView.of(position).model_dump_json()
            chunks.append(format_sse_event(event="queue", data_str=data))
        return chunks, batch.state.is_terminal
