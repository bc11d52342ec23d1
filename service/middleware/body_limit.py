"""Refuse request bodies that are larger than a limit, before or while they are read.

FastAPI's own `max_body_size` would do, but it answers in plain text if the length is announced.
"""

from collections.abc import Mapping
from types import MappingProxyType

from fastapi import HTTPException
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.middleware import problems


class BodyLimit:
    """ASGI middleware: answers 413 to a body of more than `max_bytes`; some paths take `larger`."""

    def __init__(
        self, app: ASGIApp, max_bytes: int, larger: Mapping[str, int] = MappingProxyType({})
    ) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._larger = larger

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        max_bytes = self._larger.get(scope["path"], self._max_bytes)
        detail = (
            f"The body is larger than {max_bytes} bytes, the most this service reads here; it "
            f"takes text, and no files."
        )
        announced = Headers(scope=scope).get("content-length", "0")
        if announced.isdecimal() and int(announced) > max_bytes:
            problem = problems.from_status(413, detail, scope["path"])
            await problems.response(scope["app"], problem)(scope, receive, send)
            return
        read = 0
        answering = False

        async def send_noted(message: Message) -> None:
            nonlocal answering
            answering = True
            await send(message)

        async def receive_counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > max_bytes:
                if answering:
                    # An answer has begun, so all that is left is to end the request.
                    return {"type": "http.disconnect"}
                # FastAPI's class, because its code that reads the body lets it pass.
                raise HTTPException(413, detail)
            return message

        await self._app(scope, receive_counted, send_noted)
