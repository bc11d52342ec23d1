"""Admit requests, those with the same key or session in batches.

Counting a request against its key's rate takes a thread of the pool and a call to Redis that
writes. Requests that arrive while such a call for the same key is under way wait until it ends, and
are then counted together by one call. So a busy key costs little more than a quiet one.
"""

import asyncio
from collections.abc import Sequence

from redis.exceptions import RedisError
from starlette.concurrency import run_in_threadpool

from jobs.errors import AppError
from service.auth.gate import LOCAL, Credential, Gate, Principal
from service.auth.sessions import SessionToken

Answer = Principal | AppError | RedisError


class Admission:
    """Admits the requests of one event loop."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._waiting: dict[Credential, list[asyncio.Future[Principal]]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def admit(self, credential: Credential) -> Principal:
        """Authenticate the caller and count the request; raises what `Gate.admit` raises."""
        if self._gate.is_open and not isinstance(credential, SessionToken):
            return LOCAL
        request: asyncio.Future[Principal] = asyncio.get_running_loop().create_future()
        others = self._waiting.get(credential)
        if others is None:
            self._waiting[credential] = [request]
            task = asyncio.create_task(self._admit_all(credential))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        else:
            others.append(request)
        return await request

    async def _admit_all(self, credential: Credential) -> None:
        """Admit the requests that wait with this credential, and those that arrive meanwhile."""
        while requests := self._waiting[credential]:
            self._waiting[credential] = []
            try:
                answers = await run_in_threadpool(self._ask, credential, len(requests))
            except Exception as error:  # noqa: BLE001
                # An unexpected error. It is passed to the requests, too, or they would wait for
                # ever.
                _refuse(requests, error)
                continue
            for request, answer in zip(requests, answers, strict=True):
                if isinstance(answer, Principal):
                    if not request.done():  # it may have been cancelled
                        request.set_result(answer)
                else:
                    _refuse([request], answer)
        del self._waiting[credential]

    def _ask(self, credential: Credential, requests: int) -> Sequence[Answer]:
        try:
            return self._gate.admit_all(credential, requests)
        except (AppError, RedisError) as error:
            return [error] * requests


def _refuse(requests: Sequence[asyncio.Future[Principal]], error: Exception) -> None:
    for request in requests:
        if not request.done():
            request.set_exception(error)
