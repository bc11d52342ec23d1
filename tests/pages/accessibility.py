"""Check a page in the browser with axe-core, and its width on the narrowest screens.

axe-core comes with deploy/install/npm.sh. It is injected past the page's policy, as a developer's
console would be, so the policy itself stays what it is.
"""

import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from playwright.sync_api import Page

GRAVE = ("serious", "critical")
NARROWEST = {"width": 320, "height": 640}
"""CSS pixels: a desktop of 1280 px at 400 % (WCAG 1.4.10)."""

RUN = """async (only) => {
  const options = only.length > 0 ? { runOnly: only } : {};
  return (await axe.run(document, { resultTypes: ["violations"], ...options })).violations;
}"""


@cache
def axe_core() -> str:
    """The script of axe-core."""
    path = Path(sys.prefix) / "npm" / "node_modules" / "axe-core" / "axe.min.js"
    assert path.exists(), f"{path} is missing: run `make test`, or sh deploy/install/npm.sh .venv"
    return path.read_text(encoding="utf-8")


def assert_accessible(page: Page, only: Sequence[str] = ()) -> None:
    """Require that axe-core finds nothing serious or critical, contrast in this scheme included.

    Args:
        only: the rules to check, instead of all.
    """
    if not page.evaluate("'axe' in window"):
        page.evaluate(axe_core())
    found = page.evaluate(RUN, list(only))
    told = [_told(each) for each in found if each["impact"] in GRAVE]
    assert not told, "\n".join(told)


def assert_reflows(page: Page) -> None:
    """Require that nothing has to be scrolled sideways at 320 px but tables and the like.

    Afterwards the window has the size that it had before.
    """
    before = page.viewport_size
    page.set_viewport_size(NARROWEST)  # type: ignore[arg-type]
    look = """() => {
      const right = (element) => Math.round(element.getBoundingClientRect().right);
      const all = [...document.querySelectorAll("body *")].sort((a, b) => right(b) - right(a));
      const name = (each) => `${each.tagName}.${each.className} to ${right(each)}`;
      const names = all.slice(0, 5).map(name);
      return [document.documentElement.scrollWidth - window.innerWidth, names];
    }"""
    wider, widest = page.evaluate(look)
    for _ in range(50):  # charts and tables get their width a moment later
        if wider <= 0:
            break
        page.wait_for_timeout(100)
        wider, widest = page.evaluate(look)
    if before is not None:
        page.set_viewport_size(before)
    assert wider <= 0, f"at 320 px the page is {wider} px too wide; its widest elements: {widest}"


def _told(violation: dict[str, Any]) -> str:
    places = [f"{node['target']}: {node['failureSummary']}" for node in violation["nodes"][:5]]
    return f"{violation['id']} ({violation['impact']}): {violation['help']}; at {'; '.join(places)}"
