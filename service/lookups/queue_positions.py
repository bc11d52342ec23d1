"""Places in the queues, with the workers that are live now."""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from redis.exceptions import RedisError

from jobs.catalog import Catalog
from jobs.record import JobRecord
from jobs.state import JobState
from jobs.store.queue_positions import QueuePosition, QueuePositions
from service.lookups.cached import CachedValue

logger = logging.getLogger(__name__)


class CachedQueuePositions:
    """Looks up where waiting jobs stand. Safe to share between threads."""

    def __init__(self, places: QueuePositions, catalog: CachedValue[Catalog]) -> None:
        self._places = places
        self._catalog = catalog

    def of(self, jobs: Sequence[JobRecord]) -> Mapping[str, QueuePosition]:
        """Find the places of those that wait, by id; none where Redis does not answer.

        An estimate is no reason to answer with an error, least of all when a job was just created.
        """
        if all(job.state is not JobState.QUEUED for job in jobs):
            return {}
        with _told_of_redis():
            return self._places.of(jobs, self._workers())
        return {}

    def at(self, queue: str, position: int) -> QueuePosition:
        """Describe a place that is known; without its start where Redis does not answer."""
        with _told_of_redis():
            return self._places.at(queue, position, self._workers()[queue])
        return QueuePosition(position, None)

    def _workers(self) -> Counter[str]:
        return Counter(offer.queue for offer in self._catalog.get().offers)


@contextmanager
def _told_of_redis() -> Iterator[None]:
    try:
        yield
    except RedisError as error:
        logger.warning("Places in the queues cannot be read: %r", error)
