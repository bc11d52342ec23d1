"""Say what one worker needs of a Ray cluster, and how it is started there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from deploy.local.errors import LocalError

Device = Literal["npu", "cuda", "cpu"]

TAKEN_ALONG: Final = (
    "REDIS_URL",
    "ARTIFACTS_URL",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "LOG_FORMAT",
)
"""The variables of the launcher's environment that workers get, besides WORKER_..."""


@dataclass(frozen=True, slots=True)
class WorkerPlan:
    """One worker, whose cards are all on one node.

    Attributes:
        device: what its cards are. Ray knows NVIDIA GPUs and Ascend NPUs, and tells each actor
            which of a node's cards are its own.
        cards: how many cards run each job together.
        resource: another name under which the cluster counts the cards; then Ray tells an actor
            only how many it has, so let such a node have one worker.
        cpus: how many cores Ray sets aside for it.
        folder: the working directory on every node.
        python: the interpreter on every node; "python" is the one that runs Ray there.
        config: the worker's configuration, as the nodes see it; None for WORKER_CONFIG.
    """

    device: Device
    cards: int = 1
    resource: str | None = None
    cpus: float = 1.0
    folder: str = "."
    python: str = "python"
    config: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def demand(self) -> dict[str, Any]:
        """What Ray has to find on one node, as arguments of an actor."""
        resources: dict[str, float] = {}
        if self.resource is not None:
            resources[self.resource] = self.cards
        elif self.device == "npu":
            resources["NPU"] = self.cards
        gpus = self.cards if self.device == "cuda" and self.resource is None else 0
        return {"num_cpus": self.cpus, "num_gpus": gpus, "resources": resources}

    @property
    def bundle(self) -> dict[str, float]:
        """The same as a bundle of a placement group."""
        demand = self.demand
        found = {"CPU": float(demand["num_cpus"]), "GPU": float(demand["num_gpus"])}
        return {name: n for name, n in (found | demand["resources"]).items() if n}

    @property
    def is_gang(self) -> bool:
        """Whether several processes run each job together, under torchrun."""
        return self.cards > 1

    def command(self) -> list[str]:
        """Return the worker's command (docs/several-devices.md)."""
        config = [] if self.config is None else ["--config", self.config]
        if not self.is_gang:
            return [self.python, "-m", "worker", *config]
        torchrun = [self.python, "-m", "torch.distributed.run", "--standalone"]
        torchrun += ["--nproc-per-node", str(self.cards), "--shutdown-timeout", "3600"]
        return [*torchrun, "-m", "worker", *config]


def environment_of(
    launcher: Mapping[str, str], device: Device, more: tuple[str, ...] = ()
) -> dict[str, str]:
    """Return what workers get of the launcher's environment.

    Raises:
        LocalError: a variable of `more` is not set.
    """
    for name in more:
        if name not in launcher:
            raise LocalError(f"the variable {name} is not set here; set it, or leave out --env")
    taken = {
        name: value
        for name, value in launcher.items()
        if name in TAKEN_ALONG or (name.startswith("WORKER_") and name != "WORKER_READY_FILE")
    }
    return {"WORKER_DEVICE": device, **taken, **{name: launcher[name] for name in more}}
