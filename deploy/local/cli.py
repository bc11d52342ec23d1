"""Define the commands `demo` and `generate`, which start the whole system and stop it again.

`make generate` passes its values in the GENERATE_… variables, so that a prompt needs no quoting.
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
from deploy.local.ports import LOOPBACK, find_free_port, require_free
from deploy.local.request_check import check_config, check_request
from deploy.local.session import VAR, running_stack, throwaway_stack
from deploy.local.signals import handle_signals
from deploy.local.stack import WORKER_CONFIG, Stack, StackConfig

app = typer.Typer(
    help="The whole system on this machine.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
)

_SIGNAL_EXIT = 128
_DEMO_WORKER_GRACE_S = 120.0  # longer than the longest job of the miniature

Config = Annotated[
    Path, typer.Option("--config", envvar="WORKER_CONFIG", help="The worker's configuration.")
]


@app.command()
def demo(
    port: Annotated[
        int, typer.Option(envvar=["DEMO_PORT", "SERVICE_PORT"], help="Where the service listens.")
    ] = 8000,
    host: Annotated[
        str,
        typer.Option(envvar="SERVICE_HOST", help="The address; beyond loopback it needs a key."),
    ] = LOOPBACK,
    folder: Annotated[Path, typer.Option(help="Keeps data and logs.")] = VAR / "demo",
    config: Config = WORKER_CONFIG,
) -> None:
    """Start Valkey, a worker and the service; stay until Ctrl-C; keep the data."""
    console = Console()
    with report_errors(), handle_signals() as signals:
        require_free(port, "service", "`make demo PORT=…`")
        check_config(config)
        stack_config = StackConfig(
            folder.resolve(),
            port,
            find_free_port(),
            config,
            worker_grace_s=_DEMO_WORKER_GRACE_S,
            host=host,
        )
        try:
            with running_stack(console, stack_config, signals) as stack:
                _print(demo_text(stack_config))
                try:
                    stack.supervise(_print)
                except Interrupted:
                    _print(stopping_text(stack_config))
                    raise
        except Interrupted:
            _print("Stopped: nothing is left running.")


@app.command()
def generate(  # noqa: PLR0913, PLR0917 (typer derives the command line from it)
    prompt: Annotated[
        str, typer.Option(envvar="GENERATE_PROMPT", help="What the video shows.")
    ] = "",
    mode: Annotated[
        str | None, typer.Option(envvar="GENERATE_MODE", help="How the model runs, like w8a8.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(envvar="GENERATE_SEED", help="Repeats a video; else random.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(envvar="GENERATE_STEPS", help="Denoising steps.")
    ] = None,
    size: Annotated[
        str | None, typer.Option(envvar="GENERATE_SIZE", help="Width x height, like 832x480.")
    ] = None,
    frames: Annotated[
        int | None, typer.Option(envvar="GENERATE_FRAMES", help="Frames of the video, 4k + 1.")
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(envvar="GENERATE_GUIDANCE", help="1 turns guidance off.")
    ] = None,
    negative: Annotated[
        str | None, typer.Option(envvar="GENERATE_NEGATIVE", help="What it should not show.")
    ] = None,
    out: Annotated[Path, typer.Option(envvar="GENERATE_OUT", help="The MP4 to write.")] = Path(
        "out.mp4"
    ),
    config: Config = WORKER_CONFIG,
) -> None:
    """Start everything, turn one prompt into an MP4 over HTTP, stop everything."""
    console = Console(stderr=True)
    request = client.VideoRequest(prompt, mode, seed, steps, size, frames, guidance, negative)
    with report_errors(), handle_signals() as signals:
        if not prompt.strip():
            raise LocalError('no prompt was given: say what the video shows, PROMPT="a red circle"')
        _require_writable(out)
        check_request(request, config)
        with throwaway_stack(console, config, signals) as stack:
            job = _run(stack, request, out, console)
        print(summary(job, out))


def _run(stack: Stack, request: client.VideoRequest, out: Path, console: Console) -> client.Job:
    with client.connect(stack.config.service_url) as service, JobBar(console) as bar:

        def on_update(job: client.Job) -> None:
            stack.check()
            bar.show(job)

        job = client.send(service, request)
        try:
            job = client.follow(service, job, on_update)
            client.save(service, job, out)
        except LocalError as error:
            raise LocalError(f"{error} (logs: {stack.config.logs})") from error
        return job


def _print(text: str) -> None:
    print(text, flush=True)


def _require_writable(out: Path) -> None:
    """Check before the generation whether the video can be saved."""
    if out.is_dir():
        raise LocalError(f"{out} is a folder: name a file, as in OUT=out.mp4")
    if not out.parent.is_dir():
        raise LocalError(f"the folder {out.parent} for {out.name} does not exist")


@contextmanager
def report_errors() -> Iterator[None]:
    """End the command with one line for errors of its environment, without a traceback."""
    try:
        yield
    except (LocalError, OSError, httpx.HTTPError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from error
    except Interrupted as error:
        print("stopped", file=sys.stderr)
        raise typer.Exit(_SIGNAL_EXIT + error.signal_number) from error
