"""List the pages and their states that `make screenshots` takes pictures of.

Who adds a page, or a state of one, adds a line to SCENES. Every scene is taken in light and dark,
on a desktop and on a phone.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from playwright.sync_api import FilePayload, Page

Act = Callable[[Page], None]


def _nothing(_: Page) -> None:
    pass


@dataclass(frozen=True, slots=True)
class Scene:
    """A state of a page.

    Attributes:
        name: of the picture's file.
        path: of the page; in braces a name of `tests/pages/pictures/stock.py`.
        act: brings the page, once loaded, into the state.
        before: prepares the page before it is loaded, such as a service that does not answer.
    """

    name: str
    path: str
    act: Act = _nothing
    before: Act = _nothing


def _click(name: str) -> Act:
    return lambda page: page.get_by_role("button", name=name, exact=True).first.click()


def _open(summary: str) -> Act:
    return lambda page: page.locator("summary", has_text=summary).first.click()


def _press(*keys: str) -> Act:
    def press(page: Page) -> None:
        page.locator("#player canvas").first.wait_for()
        for key in keys:
            page.keyboard.press(key)
            page.wait_for_timeout(300)

    return press


def _generate(prompt: str) -> Act:
    def generate(page: Page) -> None:
        page.get_by_label("Prompt", exact=True).fill(prompt)
        page.get_by_role("button", name="Generate", exact=True).click()
        page.wait_for_timeout(2500)

    return generate


def _start_rating(*keys: str) -> Act:
    def start(page: Page) -> None:
        page.get_by_role("button", name="Start").click()
        _press(*keys)(page)

    return start


def _refuse(page: Page) -> None:
    page.get_by_role("button", name="New comparison").click()
    page.get_by_label("Title").fill("Refused")
    page.get_by_label("From a file").check()
    table = b"prompt,seed\na small red circle,7\n,8\na small blue square,many\n"
    file = FilePayload(name="prompts.csv", mimeType="text/csv", buffer=table)
    page.locator("#file").set_input_files(file)
    page.get_by_role("button", name="Create and start").click()
    page.locator("#refused li").first.wait_for()


def _open_statistics(page: Page) -> None:
    page.get_by_role("button", name="New comparison").click()
    _open("Advanced statistics")(page)


def _invite(page: Page) -> None:
    page.get_by_label("Name of a rater").fill("Hedy")
    page.get_by_role("button", name="Add rater").click()
    page.get_by_label("Link for Hedy").wait_for()


def _watch(page: Page) -> None:
    page.get_by_role("button", name="Watch").first.click()
    page.locator("#watch-player canvas").first.wait_for()
    page.wait_for_timeout(2000)


def _signed_out(page: Page) -> None:
    """Let the service answer as to somebody without a session."""
    problem = '{"title": "Unauthorized", "status": 401, "detail": "Sign in.", "code": "none"}'
    page.route(
        re.compile("/(session|jobs)"),
        lambda route: route.fulfill(
            status=401, body=problem, content_type="application/problem+json"
        ),
    )


def _go_offline(page: Page) -> None:
    page.wait_for_timeout(1000)
    page.route("**/*", lambda route: route.abort("connectionrefused"))
    page.locator("#connection").wait_for(timeout=20_000)


SCENES: Final = (
    Scene("demo", "/"),
    Scene("demo-advanced", "/", _open("Advanced")),
    Scene("demo-words", "/", _open("What this model can draw")),
    Scene("demo-hint", "/", lambda page: page.locator("#prompt").fill("a horse on the moon")),
    Scene("demo-running", "/", _generate("a small green circle moving left on a black background")),
    Scene("demo-signed-out", "/", before=_signed_out),
    Scene("demo-offline", "/", _go_offline),
    Scene("job", "/jobs/{job}"),
    Scene("job-cancelled", "/jobs/{cancelled}"),
    Scene("job-unknown", "/jobs/00000000000000000000000000000000"),
    Scene("comparisons", "/comparisons"),
    Scene("comparisons-new", "/comparisons", _click("New comparison")),
    Scene("comparisons-statistics", "/comparisons", _open_statistics),
    Scene("comparisons-refused", "/comparisons", _refuse),
    Scene("comparison", "/comparisons/{comparison}"),
    Scene("comparison-link", "/comparisons/{comparison}", _invite),
    Scene("comparison-delete", "/comparisons/{comparison}", _click("Delete")),
    Scene("report", "/comparisons/{comparison}/report"),
    Scene("report-watch", "/comparisons/{comparison}/report", _watch),
    Scene("rate-withdrawn", "/rate#withdrawn"),
    Scene("rate-no-link", "/rate"),
    Scene("rate-instructions", "/rate#{rater}"),
    Scene("rate-pair", "/rate#{rater}", _start_rating()),
    Scene("rate-answers", "/rate#{rater}", _start_rating("ArrowLeft", "ArrowDown", "ArrowRight")),
    Scene("rate-wipe", "/rate#{rater}", _start_rating("w")),
    Scene("rate-one", "/rate#{rater}", _start_rating("x")),
    Scene("rate-closer", "/rate#{rater}", _start_rating("s", "+", "+", "+")),
    Scene("rate-keys", "/rate#{rater}", _start_rating("?")),
    Scene("ops", "/ops"),
    Scene("docs", "/docs"),
)
