"""The two commands: parse, start the stack, do the one thing, stop it.

The GENERATE_… variables are how `make generate` hands over a prompt without quoting it.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import httpx
import typer
from rich.console import Console

from deploy.local import client
from deploy.local.console import JobBar, demo_text, stopping_text, summary
from deploy.local.errors import Interrupted, LocalError
from deploy.local.ports import find_free_port, require_free
from deploy.local.session import VAR, running, throwaway_stack
from deploy.local.signals import listen_for_signals
from deploy.local.stack import WORKER_CONFIG, Stack, StackConfig

app = typer.Typer(
    help="The whole system on this machine.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
)

_SIGNAL_EXIT = 128
_DEMO_WORKER_GRACE_S = 120.0  # longer than the longest job of the miniature

Config = Annotated[Path, typer.Option("--config", help="The worker's configuration.")]


@app.command()
def demo(
    port: Annotated[int, typer.Option(help="Where the service listens.")] = 8000,
    folder: Annotated[Path, typer.Option(help="Keeps data and logs.")] = VAR / "demo",
    config: Config = WORKER_CONFIG,
) -> None:
    """Start Valkey, a worker and the service; stay until Ctrl-C; keep the data."""
    console = Console()
    with clear_errors(), listen_for_signals() as signals:
        require_free(port, "service", "`make demo PORT=…`")
        setup = StackConfig(
            folder.resolve(), port, find_free_port(), config, worker_grace_s=_DEMO_WORKER_GRACE_S
        )
        try:
            with running(console, setup, signals) as stack:
                _tell(demo_text(setup))
                try:
                    stack.keep_running(_tell)
                except Interrupted:
                    _tell(stopping_text(setup))
                    raise
        except Interrupted:
            _tell("Stopped: nothing is left running.")


@app.command()
def generate(
    prompt: Annotated[str, typer.Option(envvar="GENERATE_PROMPT")] = "",
    mode: Annotated[str | None, typer.Option(envvar="GENERATE_MODE")] = None,
    seed: Annotated[int | None, typer.Option(envvar="GENERATE_SEED")] = None,
    steps: Annotated[int | None, typer.Option(envvar="GENERATE_STEPS")] = None,
    out: Annotated[Path, typer.Option(envvar="GENERATE_OUT")] = Path("out.mp4"),
    config: Config = WORKER_CONFIG,
) -> None:
    """Start everything, turn one prompt into an MP4 over HTTP, stop everything."""
    console = Console(stderr=True)
    order = client.VideoRequest(prompt, mode, seed, steps)
    with clear_errors(), listen_for_signals() as signals:
        if not prompt.strip():
            raise LocalError('no prompt was given: say what the video shows, PROMPT="a red circle"')
        _require_writable(out)
        with throwaway_stack(console, config, signals) as stack:
            job = _run(stack, order, out, console)
        print(summary(job, out))


def _run(stack: Stack, order: client.VideoRequest, out: Path, console: Console) -> client.Job:
    with client.connect(stack.config.service_url) as service, JobBar(console) as bar:

        def watch(job: client.Job) -> None:
            stack.check()
            bar.show(job)

        job = client.send(service, order)
        try:
            job = client.follow(service, job, watch)
            client.save(service, job, out)
        except LocalError as error:
            raise LocalError(f"{error} (logs: {stack.config.logs})") from error
        return job


def _tell(text: str) -> None:
    print(text, flush=True)


def _require_writable(out: Path) -> None:
    """Finds out before the long work whether its result can be kept."""
    if out.is_dir():
        raise LocalError(f"{out} is a folder: name a file, as in OUT=out.mp4")
    if not out.parent.is_dir():
        raise LocalError(f"the folder {out.parent} for {out.name} does not exist")


@contextmanager
def clear_errors() -> Iterator[None]:
    """Ends the command with one clear line where the world, not this code, is at fault."""
    try:
        yield
    except (LocalError, OSError, httpx.HTTPError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from error
    except Interrupted as asked:
        print("stopped", file=sys.stderr)
        raise typer.Exit(_SIGNAL_EXIT + asked.signal_number) from asked
