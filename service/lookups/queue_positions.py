"""Look up the positions of queued jobs, and when they start with the workers that are live now."""

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
    """Looks up positions with a cached catalog of workers. Safe to share between threads."""

    def __init__(self, positions: QueuePositions, catalog: CachedValue[Catalog]) -> None:
        self._positions = positions
        self._catalog = catalog

    def of(self, jobs: Sequence[JobRecord]) -> Mapping[str, QueuePosition]:
        """Find the positions of the queued jobs among `jobs`, by id.

        Empty if Redis does not answer. An estimate is no reason to answer a request with an error,
        least of all when a job was just created.
        """
        if all(job.state is not JobState.QUEUED for job in jobs):
            return {}
        with _redis_errors_logged():
            return self._positions.of(jobs, self._workers())
        return {}

    def at(self, queue: str, waiting: int) -> QueuePosition:
        """Find the position of a job behind so many waiting ones.

        If Redis does not answer, what runs is not counted, and the start is unknown.
        """
        with _redis_errors_logged():
            return self._positions.at(queue, waiting, self._workers()[queue])
        return QueuePosition(waiting, None)

    def _workers(self) -> Counter[str]:
        return Counter(offer.queue for offer in self._catalog.get().offers)


@contextmanager
def _redis_errors_logged() -> Iterator[None]:
    try:
        yield
    except RedisError as error:
        logger.warning("Positions in the queues cannot be read: %r", error)
