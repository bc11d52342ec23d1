"""Put workers on a Ray cluster, look at them, and take them away again, through Ray's own calls.

Each worker is a detached, named actor: it outlives this process, and any launcher finds it by its
name. Nothing else is kept. Ray is imported here only, and only when it is needed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from deploy.local.errors import LocalError
from deploy.ray import worker_actor
from deploy.ray.plan import WorkerPlan

NAMESPACE: Final = "wan-hif8"
ANSWER_S: Final = 10.0
"""An actor that does not answer within this waits for a node, or is busy: Ray says which."""

PENDING: Final = frozenset({"DEPENDENCIES_UNREADY", "PENDING_CREATION", "RESTARTING"})
"""Ray's states of an actor that has no process now."""

_PARENT_DEATH = Path(__file__).parents[1] / "local" / "parent_death.py"


class Fleet:
    """The workers of one namespace of a Ray cluster."""

    def __init__(self, ray: Any, namespace: str) -> None:
        self._ray = ray
        self._namespace = namespace

    def names(self) -> list[str]:
        """Return the names of all workers, those that wait for a node, too."""
        found = self._ray.util.list_named_actors(all_namespaces=True)
        names = [each["name"] for each in found if each["namespace"] == self._namespace]
        return sorted(names, key=lambda name: (len(name), name))

    def add(self, name: str, plan: WorkerPlan) -> None:
        """Start a worker; Ray places it now, or once a node has what it needs."""
        options: dict[str, Any] = {"scheduling_strategy": "SPREAD"}
        if plan.is_gang:
            options["scheduling_strategy"] = self._reserve(name, plan)
        actor = self._ray.remote(worker_actor.WorkerActor).options(
            name=name,
            namespace=self._namespace,
            lifetime="detached",
            max_restarts=-1,
            max_concurrency=8,  # `status` answers while `drain` waits
            **plan.demand,
            **options,
        )
        actor.remote(
            *(self._namespace, name, plan.command(), plan.folder, dict(plan.environment)),
            _PARENT_DEATH.read_text(),
        )

    def status(self, name: str) -> dict[str, Any]:
        """Return what a worker says about itself.

        Its state is `waiting` if Ray has no process for it yet, and `silent` if there is one that
        does not answer: its worker may be in the middle of a job.
        """
        ray = self._ray
        actor = None
        try:
            actor = ray.get_actor(name, namespace=self._namespace)
            found: dict[str, Any] = ray.get(actor.status.remote(), timeout=ANSWER_S)
        except (ray.exceptions.RayError, ValueError) as error:
            state = "waiting" if actor is None or self._is_pending(actor) else "silent"
            return {"name": name, "state": state, "why": _first_line(error)}
        return found

    def _is_pending(self, actor: Any) -> bool:
        """Return whether Ray has yet to start the actor's process.

        Ray says so in public only through its dashboard, which many clusters run without.
        """
        try:
            found = self._ray._private.state.actors(actor._actor_id.hex())
            return bool(found["State"] in PENDING)
        except (AttributeError, KeyError, TypeError, RuntimeError):  # of another version
            return False

    def remove(self, names: Sequence[str], grace_s: float) -> Iterator[dict[str, Any]]:
        """Drain workers, all at the same time, and then remove them; yields how each ended."""
        ray = self._ray
        actors = {name: ray.get_actor(name, namespace=self._namespace) for name in names}
        states = {name: self.status(name) for name in names}
        drains = {
            name: actors[name].drain.remote(grace_s)
            for name in names
            if states[name]["state"] != "waiting"
        }
        for name in names:
            try:
                if name in drains:
                    states[name] = ray.get(drains[name], timeout=grace_s + 2 * ANSWER_S)
            except ray.exceptions.RayError as error:
                states[name] = {"name": name, "state": "lost", "why": _first_line(error)}
            finally:
                ray.kill(actors[name], no_restart=True)
                self._unreserve(name)
            yield states[name]

    def _reserve(self, name: str, plan: WorkerPlan) -> Any:
        """Reserve the cards of a gang: all at once, and across its restarts."""
        util = self._ray.util
        group = util.placement_group(
            [plan.bundle], strategy="STRICT_PACK", name=self._group(name), lifetime="detached"
        )
        return util.scheduling_strategies.PlacementGroupSchedulingStrategy(
            placement_group=group, placement_group_bundle_index=0
        )

    def _unreserve(self, name: str) -> None:
        try:
            group = self._ray.util.get_placement_group(self._group(name))
        except ValueError:  # it is no gang
            return
        self._ray.util.remove_placement_group(group)

    def _group(self, name: str) -> str:
        return f"{self._namespace}-{name}"


@contextmanager
def connected(address: str, namespace: str) -> Iterator[Fleet]:
    """Connect to a Ray cluster.

    Raises:
        LocalError: Ray is not installed, or the cluster does not answer.
    """
    try:
        import ray  # noqa: PLC0415  # optional, and slow
        import ray.util.scheduling_strategies  # noqa: PLC0415
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise LocalError(
            "Ray is not installed: run pip install '.[ray]' -c constraints.txt, with the version "
            "of Ray that the cluster runs"
        ) from None
    # By value, so that nodes need no copy of deploy/.
    ray.cloudpickle.register_pickle_by_value(worker_actor)
    try:
        ray.init(
            address=address,
            namespace=namespace,
            log_to_driver=False,
            logging_level=logging.WARNING,
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise LocalError(
            f"no Ray cluster answers at {address}: {_first_line(error)}; run this on one of its "
            f"nodes, or name its address (--address, RAY_ADDRESS)"
        ) from error
    try:
        yield Fleet(ray, namespace)
    finally:
        ray.shutdown()


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), repr(error))
