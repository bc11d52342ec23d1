"""A stack for the time of a block: ready when the block begins, gone when it ends."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from rich.console import Console

from deploy.local.errors import LocalError, Refused
from deploy.local.ports import find_free_port
from deploy.local.signals import Signals
from deploy.local.stack import ROOT, Stack, StackConfig

VAR = ROOT / "var"


@contextmanager
def running(console: Console, setup: StackConfig, signals: Signals) -> Iterator[Stack]:
    """A stack that is ready, with a word to the person who waits for it."""
    stack = Stack(setup, signals)
    try:
        with console.status(f"starting Valkey, worker and service (logs: {setup.logs})"):
            stack.start()
        yield stack
    finally:
        stack.stop()


@contextmanager
def throwaway_stack(console: Console, worker_config: Path, signals: Signals) -> Iterator[Stack]:
    """A ready stack on free ports whose data is gone afterwards; the logs of a failed run stay."""
    with _throwaway_folder() as folder:
        setup = StackConfig(folder, find_free_port(), find_free_port(), worker_config)
        with running(console, setup, signals) as stack:
            yield stack


@contextmanager
def _throwaway_folder() -> Iterator[Path]:
    VAR.mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=VAR, prefix="generate-"))
    keep_logs = False
    try:
        yield folder
    except (LocalError, OSError, httpx.HTTPError) as error:
        keep_logs = not isinstance(error, Refused)
        raise
    finally:
        for name in ("valkey", "artifacts"):
            shutil.rmtree(folder / name, ignore_errors=True)
        if not keep_logs:
            shutil.rmtree(folder)
