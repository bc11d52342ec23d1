"""Bound the downloads of videos and pictures, and keep a slow artifact store from slowing others.

Every read of the store waits in a thread. Requests share the event loop's pool of 40, so if reads
of a bucket that takes seconds ran there, too, a few open links would stop all other requests. Here
reads have threads of their own, and downloads are counted, by key and in all.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Final, ParamSpec, TypeVar

from anyio import CapacityLimiter, to_thread
from starlette.concurrency import run_in_threadpool
from starlette.responses import RedirectResponse, Response

from jobs.artifacts.store import ArtifactStore
from jobs.errors import ArtifactsUnavailable, TooManyDownloads, TooManyOwnDownloads
from jobs.record import JobRecord
from jobs.store.submission import OPEN_OWNER
from service.api.video_response import (
    FileStream,
    RangeRequest,
    SentFile,
    send_file,
    send_video,
    stored_file,
)
from service.schemas.video_url import VideoFile

THREADS: Final = 16
"""The most calls to the artifact store at a time."""
WAIT_S: Final = 10.0
"""How long a call may wait for one of these threads."""
SHARES: Final = 10
"""The files of one owner may be 1/SHARES of the most downloads, but at least SMALLEST_SHARE."""
SMALLEST_SHARE: Final = 10
RETRY_AFTER_S: Final = 10

P = ParamSpec("P")
T = TypeVar("T")


class Downloads:
    """The downloads of one process. Belongs to the event loop."""

    def __init__(
        self, artifacts: ArtifactStore, most: int, *, redirect_s: int | None, wait_s: float = WAIT_S
    ) -> None:
        """Create the downloads of one process.

        Args:
            most: how many may be open at a time.
            redirect_s: how long the URLs of the store are valid to which callers are redirected;
                None to send the files.
        """
        self._artifacts = artifacts
        self._most = most
        self._share = max(SMALLEST_SHARE, most // SHARES)
        self._redirect_s = redirect_s
        self._wait_s = wait_s
        self._turns = asyncio.Semaphore(THREADS)
        self._threads = CapacityLimiter(THREADS)
        self._open: Counter[str] = Counter()

    @property
    def open(self) -> int:
        """The number of files that are being sent."""
        return self._open.total()

    async def send(
        self,
        view: Callable[[], JobRecord],
        range_request: RangeRequest,
        file: VideoFile = VideoFile.VIDEO,
    ) -> Response:
        """Answer with a file of a job as `send_video` does, or with a redirection to it.

        Args:
            view: reads the job for this caller.

        Raises:
            TooManyDownloads, TooManyOwnDownloads: as many are open as may be.
            ArtifactsUnavailable: the store keeps all threads waiting.
        """
        job = await run_in_threadpool(view)
        if self._redirect_s is not None:
            method = "HEAD" if range_request.is_head else "GET"
            key = stored_file(job, file).key
            url = await self.run(self._artifacts.signed_url, key, method, self._redirect_s)
            if url is not None:
                return RedirectResponse(url, 307, {"cache-control": "no-store"})
        call = partial(send_video, self._artifacts, job, range_request, file)
        return await self._send(job.owner, call)

    async def send_file(
        self, owner: str, view: Callable[[], SentFile], range_request: RangeRequest
    ) -> Response:
        """Answer with another file, which counts for `owner`; never with a redirection.

        Raises:
            TooManyDownloads, TooManyOwnDownloads, ArtifactsUnavailable: see `send`.
        """
        sent = await run_in_threadpool(view)
        return await self._send(owner, partial(send_file, self._artifacts, sent, range_request))

    async def _send(self, owner: str, call: Callable[[], Response]) -> Response:
        with self._counted(owner):
            self._check_limits(owner)
            answer = await self.run(call)
        if isinstance(answer, FileStream):
            answer.body_iterator = self._read(answer.chunks)
            answer.while_sent = self._counted(owner)
        return answer

    async def run(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a function that uses the artifact store, in a thread of the downloads' own."""
        try:
            async with asyncio.timeout(self._wait_s):
                await self._turns.acquire()
        except TimeoutError:
            raise ArtifactsUnavailable(
                f"The artifact store is slow, and {THREADS} others wait for it; try again in a few "
                f"seconds."
            ) from None
        try:
            return await to_thread.run_sync(partial(call, *args, **kwargs), limiter=self._threads)
        finally:
            self._turns.release()

    async def _read(self, chunks: Iterator[bytes]) -> AsyncIterator[bytes]:
        """Read chunks, each in its turn."""
        while (chunk := await self.run(next, chunks, None)) is not None:
            yield chunk

    @contextmanager
    def _counted(self, owner: str) -> Iterator[None]:
        self._open[owner] += 1
        try:
            yield
        finally:
            self._open[owner] -= 1
            self._open += Counter()  # drops what is 0

    def _check_limits(self, owner: str) -> None:
        if self.open > self._most:
            raise TooManyDownloads(
                f"This process sends {self._most} files, and that is the most at a time; come back "
                f"later."
            )
        # Without keys, everybody's jobs have the same owner.
        if owner != OPEN_OWNER and self._open[owner] > self._share:
            raise TooManyOwnDownloads(
                f"{self._share} files of {owner} are being fetched from this process, and that is "
                f"the most for one key; come back when one is finished.",
                retry_after_s=RETRY_AFTER_S,
            )
