"""Collect the metrics that `/metrics` shows, at each request for them.

Metrics of jobs, queues and workers come from Redis, so every process shows the same. Each process
adds the metrics of its own HTTP requests.
"""

import asyncio
import platform
from collections.abc import Iterator
from importlib.metadata import version

from anyio import CapacityLimiter, to_thread
from prometheus_client import CollectorRegistry, Gauge, ProcessCollector, disable_created_metrics
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from redis import Redis
from redis.exceptions import ConnectionError as RedisAway
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeout

from jobs import redis_keys
from jobs.redis_client import BRIEF, connect
from service.monitoring import fleet_metrics, job_metrics
from service.monitoring.fleet import snapshot
from service.monitoring.http_metrics import HttpMetrics

_VERSION = version("wan-hif8")


class Exposition:
    """The metrics of one process."""

    def __init__(self, redis_url: str) -> None:
        # The `_created` series would double the number of series, only to say when each began.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._redis = connect(redis_url, BRIEF)
        self._registry = CollectorRegistry()
        self.http = HttpMetrics(self._registry)
        build = Gauge(
            "wan_build_info",
            "1; the labels say what runs.",
            ["version", "python"],
            registry=self._registry,
        )
        build.labels(_VERSION, platform.python_version()).set(1)
        ProcessCollector(registry=self._registry)
        self._registry.register(_RedisCollector(self._redis))
        self._redis_down = CollectorRegistry()
        self._redis_down.register(_RedisDownCollector())
        # A thread of its own: while Redis is down, requests may occupy all the others.
        self._limiter = CapacityLimiter(1)
        self._pinging: asyncio.Future[bool] | None = None

    async def text(self, accept: str, is_known: bool) -> tuple[bytes, str]:
        """Read all metrics; for a reader that is not known, only the one that says Redis is down.

        Returns:
            The metrics in the format that suits the header `accept`, and its media type.
        """
        encode, media_type = choose_encoder(accept)
        if not is_known:
            # Needs no thread: unknown readers could otherwise keep the only one busy.
            return encode(self._redis_down), media_type
        return await to_thread.run_sync(encode, self._registry, limiter=self._limiter), media_type

    async def redis_answers(self) -> bool:
        """Ping Redis; callers share a ping that is under way. Takes about a second at most."""
        if self._pinging is None or self._pinging.done():
            ping = to_thread.run_sync(self._ping, limiter=self._limiter)
            self._pinging = asyncio.ensure_future(ping)
        # Shielded, so that it is not cancelled with the caller that started it.
        return await asyncio.shield(self._pinging)

    def _ping(self) -> bool:
        try:
            return bool(self._redis.ping())
        except RedisError:
            return False

    def add(self, collector: Collector) -> None:
        """Show the metrics of a collector, too."""
        self._registry.register(collector)

    def close(self) -> None:
        self._redis.close()


def _up(value: int) -> Metric:
    return GaugeMetricFamily(
        "wan_redis_up",
        "Whether Redis answers; without it there is only what this process measures itself.",
        value,
    )


class _RedisDownCollector(Collector):
    def collect(self) -> Iterator[Metric]:
        yield _up(0)


class _RedisCollector(Collector):
    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    def collect(self) -> Iterator[Metric]:
        try:
            found = self._read()
        except (RedisAway, RedisTimeout):
            yield _up(0)
            return
        yield _up(1)
        yield from found

    def _read(self) -> list[Metric]:
        with self._redis.pipeline(transaction=False) as pipe:
            pipe.hgetall(redis_keys.METRICS)
            pipe.hgetall(redis_keys.DURATIONS)
            pipe.exists(redis_keys.RETENTION_REFUSED)
            counters, durations, refused = pipe.execute()
        return [
            GaugeMetricFamily(
                "wan_retention_refused",
                "1 while nothing is deleted because the clocks cannot be believed.",
                refused,
            ),
            *fleet_metrics.families(snapshot(self._redis)),
            *job_metrics.families(counters, durations),
        ]
