"""Run a stack for the duration of a `with` block."""

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
def running_stack(console: Console, config: StackConfig, signals: Signals) -> Iterator[Stack]:
    """Start a stack, with a message while it starts; yields it when it is ready."""
    stack = Stack(config, signals)
    try:
        with console.status(f"starting Valkey, worker and service (logs: {config.logs})"):
            stack.start()
        yield stack
    finally:
        stack.stop()


@contextmanager
def throwaway_stack(console: Console, worker_config: Path, signals: Signals) -> Iterator[Stack]:
    """Run a stack on free ports and delete its data afterwards; logs of a failed run are kept."""
    with _throwaway_folder() as folder:
        config = StackConfig(
            folder, find_free_port(), find_free_port(), worker_config, private=True
        )
        with running_stack(console, config, signals) as stack:
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
