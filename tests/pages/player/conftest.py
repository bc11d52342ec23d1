"""Serve a page with the player and two numbered videos, under the policy of all pages."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI, HTTPException
from fastapi.responses import FileResponse, HTMLResponse
from jinja2 import Environment, PackageLoader
from playwright.sync_api import Browser, Page

from deploy.local.waiting import wait_until
from service.middleware.security_headers import SecurityHeaders
from service.pages import static_files
from tests.pages.conftest import DESKTOP, Visit
from tests.pages.player.numbered_video import (
    FPS,
    FRAMES,
    HEIGHT,
    READ_NUMBER,
    SHORT_GROUPS,
    WIDTH,
    write_numbered_video,
)

PAGE = """{% extends "base.html" %}
{% block title %}A pair{% endblock %}
{% block main %}<h1>A pair</h1><div id="player"></div>{% endblock %}
"""

SET_UP = f"""
async ([base, left, right, options]) => {{
  const {{ PairPlayer }} = await import(`./${{base}}/player/player.js`);
  const read = {READ_NUMBER};
  window.painted = [];
  window.events = [];
  window.player = new PairPlayer(document.getElementById("player"), {{
    leftUrl: left, rightUrl: right,
    fps: {FPS}, numFrames: {FRAMES}, width: {WIDTH}, height: {HEIGHT}, ...options,
    onEvent(event) {{
      window.events.push(event);
      if (event.type !== "framechange") return;
      window.painted.push([event.frame, ...window.player.canvases.map(read)]);
    }},
  }});
  return window.player.load();
}}
"""


@pytest.fixture(scope="session")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two videos like viewing copies, and two with the encoder's own groups."""
    folder = tmp_path_factory.mktemp("videos")
    for kind, options in [("short", SHORT_GROUPS), ("usual", ())]:
        for background, side in enumerate(("left", "right"), start=1):
            write_numbered_video(
                folder / f"{kind}-{side}.mp4", background=background, options=options
            )
    return folder


@pytest.fixture(scope="module")
def player_site(videos: Path) -> Iterator[str]:
    """The URL of a server with the page, the videos and the service's own files."""
    app = FastAPI()
    app.include_router(static_files.router)
    app.add_middleware(SecurityHeaders)

    @app.get("/pair")
    def pair() -> HTMLResponse:
        template = Environment(loader=PackageLoader("service.pages")).from_string(PAGE)
        return HTMLResponse(template.render(root="./", static=static_files.static_files().base))

    @app.get("/session")
    def session() -> dict[str, object]:
        return {"name": "", "role": "rater", "open": True}

    @app.get("/videos/{name}")
    def video(name: str) -> FileResponse:
        if not (videos / name).exists():
            raise HTTPException(404)
        return FileResponse(videos / name, media_type="video/mp4")

    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            wait_until(lambda: server.started)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(20)


class Pair:
    """A page with a player, and what it has painted."""

    def __init__(self, page: Page) -> None:
        self.page = page

    def load(self, kind: str, **options: Any) -> bool:
        """Open the page and load two videos; return whether the first pair is shown."""
        names = (f"videos/{kind}-left.mp4", f"videos/{kind}-right.mp4")
        return bool(self.page.evaluate(SET_UP, [static_files.static_files().base, *names, options]))

    def call(self, expression: str) -> Any:
        """Return the value of an expression about `player`, once it is there."""
        return self.page.evaluate(f"async () => {{ return await ({expression}); }}")

    def painted(self) -> list[tuple[int, int, int]]:
        """The announced number of each pair painted since the last call, and both that are read."""
        return [tuple(each) for each in self.call("window.painted.splice(0)")]


@pytest.fixture
def pair(browser: Browser, player_site: str) -> Iterator[Pair]:
    context = browser.new_context(viewport=DESKTOP)  # type: ignore[arg-type]
    visit = Visit(context.new_page(), player_site)
    visit.watch()
    yield Pair(visit.open("/pair"))
    context.close()
    assert visit.faults == []
