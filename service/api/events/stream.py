"""One job's events as server-sent events.

FastAPI has the wire format (`fastapi.sse`), and only that is used of it: what it makes of a route
with its response class is a generator that cannot answer 204, costs two more tasks for each
stream, and leaves it open who ends a stream. `sse-starlette` has more switches, but patches uvicorn
to learn of the end of the process, which `service/server.py` tells the hub instead.
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
"""How long a client waits before it comes back after its connection broke."""

AGAIN_S: Final = 1.0
"""How long a stream waits to ask again while Redis is away."""

HEADERS: Final = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


class EventStream(StreamingResponse):
    """Sends what happened to a job after the event `after`, and what happens, until it ends.

    Ends early when the job is deleted or the process ends. Raises TooManyStreams and
    TooManyOwnStreams before anything is sent.
    """

    media_type = "text/event-stream"

    send_s: ClassVar = 60.0
    """A client that takes nothing for so long, though the network's buffers are full, is left."""

    def __init__(
        self,
        hub: EventHub,
        follower: Follower,
        after: str,
        heartbeat_s: float,
        view: Callable[[], JobView],
    ) -> None:
        super().__init__(self._chunks(), headers=HEADERS)
        self._hub = hub
        self._follower = follower
        self._job = follower.job
        self._after = after
        self._heartbeat_s = heartbeat_s
        self._view = view
        self._place: QueuePosition | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Here and not in the generator, which may be left standing when the client goes away.
        with self._hub.follow(self._follower):
            await super().__call__(scope, receive, send)

    async def stream_response(self, send: Send) -> None:
        async def send_in_time(message: Message) -> None:
            async with asyncio.timeout(self.send_s):
                await send(message)

        chunks = cast("Any", self.body_iterator)
        try:
            await super().stream_response(send_in_time)
        except TimeoutError:
            # The server sees that the answer is not complete, and closes the connection.
            logger.warning("An event stream is given up: its client takes nothing any more.")
        finally:
            await chunks.aclose()

    async def _chunks(self) -> AsyncIterator[bytes]:
        yield format_sse_event(retry=RECONNECT_MS)
        while not self._hub.is_closing:
            self._follower.changed.clear()
            wait_s = self._heartbeat_s
            try:
                news, is_over = await self._news()
            except (RedisError, OSError):
                news, is_over, wait_s = [], False, min(wait_s, AGAIN_S)
            if news:
                yield b"".join(news)
            if is_over:
                return
            try:
                async with asyncio.timeout(wait_s):
                    await self._follower.changed.wait()
            except TimeoutError:
                yield KEEPALIVE_COMMENT

    async def _news(self) -> tuple[list[bytes], bool]:
        """What to send now, and whether that is all there will ever be."""
        news = await self._hub.read(self._job.id, self._after)
        if news.state is None:
            return [], True
        self._hub.note_state(self._follower, news.state)
        chunks: list[bytes] = []
        for told in news.told:
            if told.ends:
                try:
                    view = await run_in_threadpool(self._view)
                except JobNotFound:
                    return chunks, True
                return [*chunks, encode(self._job.id, told.event, view)], True
            chunks.append(told.chunk)
        if news.told:
            self._after = news.told[-1].event.event_id
        place = self._follower.place
        if news.state is JobState.QUEUED and place not in (None, self._place):
            assert place is not None, "told apart just now"
            self._place = place
            data = QueueView.of(place).model_dump_json()
            chunks.append(format_sse_event(event="queue", data_str=data))
        return chunks, news.state.is_terminal
