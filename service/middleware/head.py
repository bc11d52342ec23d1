"""Answer HEAD wherever GET is answered: with GET's status and headers, and without its body."""

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.middleware.problems import methods_at


class _BodyNotWanted(OSError):
    """Ends an answer that is sent piece by piece, as a connection does that was closed."""


class HeadAsGet:
    """ASGI middleware: runs the route of GET for a HEAD, unless the path has its own for HEAD."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if (
            scope["type"] != "http"
            or scope["method"] != "HEAD"
            or "HEAD" in methods_at(scope["app"], scope["path"])
        ):
            await self._app(scope, receive, send)
            return
        answered = False

        async def send_head(message: Message) -> None:
            nonlocal answered
            # The server looks here for whether a body follows, and the log for what was asked.
            scope["method"] = "HEAD"
            if message["type"] == "http.response.start":
                await send(message)
                await send({"type": "http.response.body"})
                answered = True
            elif message.get("more_body"):
                raise _BodyNotWanted("a HEAD has no body")

        scope["method"] = "GET"
        try:
            await self._app(scope, receive, send_head)
        except (ClientDisconnect, _BodyNotWanted):
            if not answered:
                raise
        finally:
            scope["method"] = "HEAD"
