"""The list of what a service process does beside answering requests."""

from collections.abc import Sequence

from jobs import recovery
from service.deps import Parts
from service.housekeeping import Task


def chores(parts: Parts) -> Sequence[Task]:
    """Name every task; each works on the parts of the application."""
    recover = recovery.Recovery(parts.redis)
    return (Task("recovery", recovery.EVERY_S, lambda _: recover.run()),)
