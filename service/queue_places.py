"""Places in the queues, with the workers that are live now."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence

from redis.exceptions import RedisError

from jobs.catalog import Catalog
from jobs.places import Place, Places
from jobs.record import JobRecord
from jobs.state import JobState
from service.remembered import Remembered

logger = logging.getLogger(__name__)


class QueuePlaces:
    """Looks up where waiting jobs stand. Safe to share between threads."""

    def __init__(self, places: Places, catalog: Remembered[Catalog]) -> None:
        self._places = places
        self._catalog = catalog

    def of(self, jobs: Sequence[JobRecord]) -> Mapping[str, Place]:
        """Find the places of those that wait, by id; none where Redis does not answer.

        An estimate is no reason to answer with an error, least of all when a job was just created.
        """
        if all(job.state is not JobState.QUEUED for job in jobs):
            return {}
        try:
            offers = self._catalog.get().offers
            return self._places.of(jobs, Counter(offer.queue for offer in offers))
        except RedisError as error:
            logger.warning("Places in the queues cannot be read: %r", error)
            return {}
