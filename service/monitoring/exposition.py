"""Everything that `/metrics` shows, read when it is asked for.

What is about jobs, queues and workers comes from Redis, so every process shows the same, and adds
what it has measured of its own requests.
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
from service.monitoring.fleet import look
from service.monitoring.http_metrics import HttpMeasures


class Exposition:
    """The metrics of one process."""

    def __init__(self, redis_url: str) -> None:
        # They would double the number of series, to say since when this process counts.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._redis = connect(redis_url, BRIEF)
        self._registry = CollectorRegistry()
        self.http = HttpMeasures(self._registry)
        build = Gauge(
            "wan_build_info",
            "1; the labels say what runs.",
            ["version", "python"],
            registry=self._registry,
        )
        build.labels(version("wan-hif8"), platform.python_version()).set(1)
        ProcessCollector(registry=self._registry)
        self._registry.register(_FromRedis(self._redis))
        self._away = CollectorRegistry()
        self._away.register(_Away())
        # A thread of its own: while Redis is away, requests may hold all the others.
        self._limiter = CapacityLimiter(1)
        self._asking: asyncio.Future[bool] | None = None

    async def text(self, accept: str, is_known: bool) -> tuple[bytes, str]:
        """Read all metrics, or only that Redis is away, for a reader who is not known.

        Returns them in the format that suits `accept`, and its media type.
        """
        encode, media_type = choose_encoder(accept)
        if not is_known:
            # One line that reads nothing: it waits for no thread, which strangers could keep busy.
            return encode(self._away), media_type
        return await to_thread.run_sync(encode, self._registry, limiter=self._limiter), media_type

    async def redis_answers(self) -> bool:
        """Ask Redis for a sign of life, once for all who ask meanwhile; takes about a second."""
        if self._asking is None or self._asking.done():
            asked = to_thread.run_sync(self._ping, limiter=self._limiter)
            self._asking = asyncio.ensure_future(asked)
        # Shielded: it is not cancelled with the caller who asked first.
        return await asyncio.shield(self._asking)

    def _ping(self) -> bool:
        try:
            return bool(self._redis.ping())
        except RedisError:
            return False

    def close(self) -> None:
        self._redis.close()


def _up(value: int) -> Metric:
    return GaugeMetricFamily(
        "wan_redis_up",
        "Whether Redis answers; without it there is only what this process measures itself.",
        value,
    )


class _Away(Collector):
    def collect(self) -> Iterator[Metric]:
        yield _up(0)


class _FromRedis(Collector):
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
            pipe.hgetall(redis_keys.PACE)
            counters, pace = pipe.execute()
        return [*fleet_metrics.families(look(self._redis)), *job_metrics.families(counters, pace)]
