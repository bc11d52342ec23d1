"""Define the commands `up`, `status` and `down` of `python -m deploy.ray`."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from deploy.local.errors import LocalError
from deploy.local.stack import ROOT
from deploy.ray.launcher import NAMESPACE, Fleet, connected
from deploy.ray.plan import Device, WorkerPlan, environment_of

app = typer.Typer(
    help="Workers on a Ray cluster: Ray places and restarts them, jobs stay in Redis.",
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
)

Address = Annotated[
    str, typer.Option(envvar="RAY_ADDRESS", help="The cluster, as ray.init takes it.")
]
Namespace = Annotated[str, typer.Option(help="Where the workers' names are unique.")]


@app.command()
def up(  # noqa: PLR0913, PLR0917  # each is an option
    device: Annotated[Device, typer.Option(help="What the cards are.")],
    workers: Annotated[int, typer.Option(min=1, help="How many workers there are to be.")],
    cards: Annotated[int, typer.Option(min=1, help="Cards that run each job together.")] = 1,
    resource: Annotated[
        str | None, typer.Option(help="The cluster's own name for a card, if it is not Ray's.")
    ] = None,
    cpus: Annotated[float, typer.Option(min=0, help="Cores for each worker.")] = 1.0,
    config: Annotated[
        str | None, typer.Option(help="The worker's TOML file, as the nodes see it.")
    ] = None,
    folder: Annotated[Path, typer.Option(help="The working directory on the nodes.")] = ROOT,
    python: Annotated[
        str, typer.Option(help="The interpreter on the nodes [default: that of Ray].")
    ] = "python",
    env: Annotated[
        list[str] | None,
        typer.Option(help="One more variable that workers get from this environment."),
    ] = None,
    wait_s: Annotated[
        float, typer.Option(min=0, help="How long to wait until all are ready; 0 not to.")
    ] = 0,
    address: Address = "auto",
    namespace: Namespace = NAMESPACE,
) -> None:
    """Start the workers that are missing; those that are there stay as they are."""
    with _one_line_for_errors():
        plan = WorkerPlan(
            *(device, cards, resource, cpus, str(folder), python, config),
            environment=environment_of(os.environ, device, tuple(env or ())),
        )
        with connected(address, namespace) as fleet:
            before = fleet.names()
            wanted = [f"worker-{number}" for number in range(workers)]
            for name in wanted:
                if name not in before:
                    fleet.add(name, plan)
            print(f"started {len(set(wanted) - set(before))}, kept {len(before)}")
            if not _are_ready(fleet, wanted, wait_s):
                raise LocalError(f"not all workers are ready within {wait_s:g} s; see status")


@app.command()
def status(
    address: Address = "auto",
    namespace: Namespace = NAMESPACE,
    as_json: Annotated[bool, typer.Option("--json", help="All that is known.")] = False,
) -> None:
    """Show each worker: where it is, its state, and how it ended the last time."""
    with _one_line_for_errors(), connected(address, namespace) as fleet:
        found = [fleet.status(name) for name in fleet.names()]
    if as_json:
        print(json.dumps(found, indent=2))
        return
    for each in found:
        print(_line(each))


@app.command()
def down(
    names: Annotated[list[str] | None, typer.Argument(help="Which [default: all].")] = None,
    grace_s: Annotated[
        float, typer.Option(min=0, help="How long a worker may take to end its job.")
    ] = 3600.0,
    address: Address = "auto",
    namespace: Namespace = NAMESPACE,
) -> None:
    """Have workers end as WORKER_DRAIN says, and remove them."""
    with _one_line_for_errors(), connected(address, namespace) as fleet:
        there = fleet.names()
        unknown = sorted(set(names or ()) - set(there))
        if unknown:
            raise LocalError(
                f"there is no worker {', '.join(unknown)}; there are {', '.join(there) or 'none'}"
            )
        for each in fleet.remove(names or there, grace_s):
            print(_line(each))


def _are_ready(fleet: Fleet, names: list[str], wait_s: float) -> bool:
    deadline = time.monotonic() + wait_s
    while wait_s:
        if all(fleet.status(name)["state"] == "ready" for name in names):
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(1)
    return True


def _line(worker: dict[str, Any]) -> str:
    parts = [f"{worker['name']}: {worker['state']}"]
    if "pid" in worker:
        cards = f", cards {worker['cards']}" if worker["cards"] else ""
        parts.append(f"on {worker['node']}, pid {worker['pid']}{cards}, {worker['seconds']:.0f} s")
    if worker.get("why"):
        parts.append(worker["why"])
    if worker.get("ends"):
        last = worker["ends"][-1]
        said = f": {last['line']}" if last["line"] else ""
        parts.append(f"last end at {last['at']}: {last['how']}{said}")
    return "; ".join(parts)


@contextmanager
def _one_line_for_errors() -> Iterator[None]:
    try:
        yield
    except LocalError as error:
        sys.exit(f"deploy.ray: {error}")
