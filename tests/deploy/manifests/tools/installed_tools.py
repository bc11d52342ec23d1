"""Run the tools and servers that `make check-deploy` fetches into .venv/deploy-checks."""

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from deploy.local.waiting import wait_until

ROOT = Path(__file__).resolve().parents[4]
FOLDER = Path(os.environ.get("DEPLOY_CHECKS", ROOT / ".venv" / "deploy-checks"))


def tool(name: str) -> str:
    """Return the path of a tool: of the environment, of unpacked packages, or of the machine."""
    places = (FOLDER / "bin", FOLDER / "root/usr/bin", FOLDER / "root/usr/sbin")
    found = shutil.which(name, path=os.pathsep.join([*map(str, places), os.environ["PATH"]]))
    assert found, f"there is no {name}: run `make check-deploy`, which installs it"
    return found


def run(
    command: Sequence[str | Path], *, stdin: str = "", environment: Mapping[str, str] | None = None
) -> "subprocess.CompletedProcess[str]":
    """Run a tool by name, and return what it printed and how it ended."""
    first, *rest = command
    return subprocess.run(
        [tool(str(first)), *map(str, rest)],
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
        env={**os.environ, **(environment or {})},
    )


@contextmanager
def server(
    command: Sequence[str | Path],
    folder: Path,
    port: int,
    environment: Mapping[str, str] | None = None,
) -> Iterator[None]:
    """Run a server until the block ends; inside it, the port on loopback is open."""

    def is_open() -> bool:
        assert process.poll() is None, log.read_text(encoding="utf-8")
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    first, *rest = command
    log = folder / f"{first}.log"
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            [tool(str(first)), *map(str, rest)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
            cwd=folder,
        )
    try:
        wait_until(is_open, 30, f"{first} listens", lambda: log.read_text(encoding="utf-8"))
        yield
    finally:
        process.terminate()
        process.wait(30)
