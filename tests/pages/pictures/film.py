"""Film a comparison at work, about a minute: .venv/bin/python -m tests.pages.pictures.film FILE.mp4

An operator's page, a rater who looks at pairs in every view and votes with keys, and the report.
The browser's own frames are encoded with their times. `make film` calls it; SITE=URL films a
service that runs already.
"""

from __future__ import annotations

import base64
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import imageio_ffmpeg
from playwright.sync_api import Page, sync_playwright

from tests.pages.conftest import ARGUMENTS, chromium
from tests.pages.pictures.screenshots import running_site
from tests.pages.pictures.stock import Stock

SIZE = {"width": 1280, "height": 800}
SECONDS = 60
FPS = 25

CAPTION = """
(text) => {
  const caption = document.querySelector("#caption") ?? document.createElement("p");
  caption.id = "caption";
  caption.textContent = text;
  const style = {
    position: "fixed", left: "50%", bottom: "12px", translate: "-50%", margin: "0",
    padding: "6px 18px", "border-radius": "8px", background: "#111d", color: "#fff",
    font: "500 17px/1.5 sans-serif", "z-index": "99", "white-space": "nowrap",
  };
  for (const [name, value] of Object.entries(style)) caption.style.setProperty(name, value);
  (document.querySelector("dialog[open]") ?? document.body).append(caption);
}
"""


class Film:
    """Records what a page shows."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.frames: list[tuple[float, bytes]] = []
        self._session = page.context.new_cdp_session(page)
        self._session.on("Page.screencastFrame", self._keep)
        self._session.send("Page.startScreencast", {"format": "jpeg", "quality": 92})

    def say(self, text: str, seconds: float) -> None:
        """Show a caption, and go on filming for a while."""
        self.page.evaluate(CAPTION, text)
        self.page.wait_for_timeout(seconds * 1000)

    def write(self, path: Path) -> None:
        """Encode the frames, each for as long as it was shown; the last fills up the length."""
        self._session.send("Page.stopScreencast")
        begin = self.frames[0][0]
        times = [moment - begin for moment, _ in self.frames]
        until = [*times[1:], max(times[-1] + 1, SECONDS)]
        with tempfile.TemporaryDirectory() as folder:
            lines = []
            for number, (_, picture) in enumerate(self.frames):
                (Path(folder) / f"{number}.jpg").write_bytes(picture)
                lines += [f"file {number}.jpg", f"duration {until[number] - times[number]:.4f}"]
            lines.append(f"file {len(self.frames) - 1}.jpg")  # ffmpeg ends with a file, not a time
            (Path(folder) / "list.txt").write_text("\n".join(lines))
            source = ("-f", "concat", "-i", f"{folder}/list.txt")
            shape = f"fps={FPS},scale={SIZE['width']}:{SIZE['height']},format=yuv420p"
            target = ("-vf", shape, "-c:v", "libx264", "-crf", "26", "-movflags", "+faststart")
            ffmpeg = imageio_ffmpeg.get_ffmpeg_exe()
            command = [ffmpeg, "-v", "error", *source, *target, "-t", f"{until[-1]:.2f}", "-y"]
            subprocess.run([*command, str(path)], check=True)
        longest = max((after - before for before, after in pairwise(times)), default=0.0)
        told = f"{until[-1]:.0f} s of {len(self.frames)} frames, the longest of {longest:.1f} s"
        print(f"{path}: {told}")  # noqa: T201

    def _keep(self, event: dict[str, Any]) -> None:
        self.frames.append((event["metadata"]["timestamp"], base64.b64decode(event["data"])))
        self._session.send("Page.screencastFrameAck", {"sessionId": event["sessionId"]})


def vote(page: Page, *keys: str) -> None:
    """Answer one question after the other with keys, and send the vote."""
    questions = page.locator(".question").count()
    for number in range(questions):
        page.keyboard.press(keys[number % len(keys)])
        page.wait_for_timeout(250)
    page.wait_for_timeout(600)
    page.keyboard.press("Enter")
    page.wait_for_timeout(1200)


def play(film: Film, site: str, names: dict[str, str]) -> None:
    """The film, from the operator's page to the report."""
    page, press = film.page, film.page.keyboard.press
    page.goto(f"{site}/comparisons/{names['comparison']}")
    film.say("Two modes made the same videos: equal prompts, equal seeds", 6)
    page.goto(f"{site}/rate#{names['rater']}")
    film.say("A rater opens a link, and reads what to look for", 5)
    page.get_by_role("button", name="Start").click()
    page.locator("#player canvas").first.wait_for()
    film.say("Which side is which mode, nobody is told. Both always show the same frame", 6)
    film.say("Votes are given with keys", 1)
    vote(page, "ArrowLeft", "ArrowDown", "ArrowRight")
    press("[")
    press("[")
    film.say("Slower", 4)
    press("Space")
    for _ in range(4):
        press(".")
        film.say("Frame by frame", 0.5)
    for _ in range(3):
        press("+")
        film.say("Closer, both together", 0.7)
    for _ in range(2):
        press("Shift+ArrowRight")
        film.say("Closer, both together", 0.5)
    press("0")
    press("w")
    for share in ("70", "60", "50", "40", "30"):
        page.get_by_label("Wipe", exact=True).fill(share)
        film.say("A wipe between the two", 0.6)
    for _ in range(3):
        press("x")
        film.say("One at a time, in the same place", 1)
    press("s")
    press("?")
    film.say("Every key can be changed or switched off", 3)
    press("Escape")
    film.say("And on to the next", 0.5)
    vote(page, "ArrowRight", "ArrowRight", "ArrowDown")
    film.say("One vote can be taken back until the next", 2)
    page.context.clear_cookies()  # from here on an operator again: raters may not see it
    page.goto(f"{site}/comparisons/{names['comparison']}/report")
    film.say("The report: is it as good, by the margin fixed beforehand?", 5)
    for _ in range(6):
        page.mouse.wheel(0, 350)
        film.say("Intervals, raters, checks and each pair", 1.5)


def main() -> None:
    """Fill a service, film it, write the file."""
    path = Path(sys.argv[1])
    path.parent.mkdir(parents=True, exist_ok=True)
    with running_site() as site, sync_playwright() as playwright:
        stock = Stock(site)
        stock.fill_comparison()
        browser = playwright.chromium.launch(executable_path=chromium(), args=ARGUMENTS)
        page = browser.new_page(viewport=SIZE, color_scheme="light")  # type: ignore[arg-type]
        film = Film(page)
        play(film, site, stock.names)
        film.write(path)
        browser.close()


if __name__ == "__main__":
    main()
