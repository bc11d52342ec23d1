"""The list of what a service process does beside answering requests."""

from collections.abc import Sequence
from functools import partial
from typing import Final

from jobs.store import recovery
from service.deps import Parts
from service.upkeep import retention
from service.upkeep.housekeeping import Task
from service.upkeep.retention import Retention
from service.webhooks.build import courier

DELETIONS_EVERY_S: Final = 5.0
TOKENIZERS_EVERY_S: Final = 10.0
"""Seldom, so that processes which were not started together do not all read a new one in the same
seconds: they can do nothing else then."""
WEBHOOKS_AGAIN_S: Final = 1.0
"""After a fault: until then they are under way all the time."""


def chores(parts: Parts) -> Sequence[Task]:
    """Name every task; each works on the parts of the application."""
    recover = recovery.Recovery(parts.redis)
    retain = Retention(parts.redis, parts.artifacts, parts.settings.keep)
    sweep = partial(retention.sweep_deletions, parts.redis, parts.artifacts)
    tasks = [
        Task("recovery", recovery.EVERY_S, lambda _: recover.run()),
        Task("deletion", DELETIONS_EVERY_S, sweep),
        Task("retention", retention.ASK_EVERY_S, retain.run_if_due),
        Task("tokenizers", TOKENIZERS_EVERY_S, lambda _: _prepare_tokenizers(parts)),
    ]
    webhooks = courier(parts)
    if webhooks is not None:
        tasks.append(Task("webhooks", WEBHOOKS_AGAIN_S, webhooks.run))
    return tasks


def _prepare_tokenizers(parts: Parts) -> None:
    named = (offer.model.tokenizer for offer in parts.catalog.get().offers)
    parts.tokens.prepare(name for name in named if name is not None)
