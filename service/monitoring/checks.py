"""Keep what a process has found out about Redis' settings and the artifact store, and show it.

A task of the process looks every minute or so, so that no request waits for it.
"""

import logging
from collections.abc import Iterator
from math import nan
from typing import Final

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from redis import Redis

from jobs.artifacts.known_store import KnownArtifactStore
from jobs.store.durability import UNCHECKED, Durability, Risk, read_risks

logger = logging.getLogger(__name__)

SETTINGS: Final = ("maxmemory-policy", "appendonly", "replicas", UNCHECKED)


class Checks(Collector):
    """The latest results, for `/readyz` and for metrics. Safe to share between threads."""

    def __init__(self, redis: Redis, artifacts: KnownArtifactStore, durability: Durability) -> None:
        self._redis = redis
        self._artifacts = artifacts
        self._durability = durability
        self._risks: tuple[Risk, ...] | None = None

    def look_at_redis(self) -> None:
        """Read Redis' settings, and log what has changed. Raises RedisError."""
        before, self._risks = self._risks or (), read_risks(self._redis, self._durability)
        for risk in self._risks:
            if risk not in before:
                logger.warning("%s", risk.detail)
        for setting in {risk.setting for risk in before} - {risk.setting for risk in self._risks}:
            logger.info("Redis' setting is safe now: %s", setting)

    def warnings(self) -> list[str]:
        """Say what an operator should mend, though jobs can be run; one sentence each."""
        found = [risk.detail for risk in self._risks or ()]
        if self._artifacts.is_present is False:
            found.append("The artifact store is missing or does not respond; the log says why.")
        return found

    def collect(self) -> Iterator[Metric]:
        """Build the metrics; a value that was not looked at yet is NaN."""
        present, risks = self._artifacts.is_present, self._risks
        yield GaugeMetricFamily(
            "wan_artifacts_up",
            "Whether the artifact store responds and is the one that Redis knows.",
            nan if present is None else int(present),
        )
        family = GaugeMetricFamily(
            "wan_redis_unsafe",
            "1 where a setting of Redis may lose accepted jobs; `unchecked`: it tells none.",
            labels=["setting"],
        )
        unsafe = {risk.setting for risk in risks or ()}
        for setting in SETTINGS:
            family.add_metric([setting], nan if risks is None else int(setting in unsafe))
        yield family
