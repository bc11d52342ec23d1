"""Put the service together.

Importing this module does nothing; `create_app` builds an application.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool

from jobs import catalog
from jobs.artifacts.store import open_artifacts
from jobs.redis_client import connect
from jobs.store.job_store import JobStore
from jobs.store.queue_positions import QueuePositions
from jobs.store.webhook_outbox import Outbox
from service.api import openapi
from service.api.deps import AppState
from service.api.events.hub import EventHub
from service.api.openai import errors as openai_errors
from service.api.openai import routes as videos
from service.api.openai.schemas import VideoObject
from service.api.routes import events, health, jobs, models, operations
from service.auth.admission import Admission
from service.auth.api_keys import KeyStore
from service.auth.gate import Gate
from service.auth.rate_limit import RateLimiter
from service.lookups.cached import CachedValue
from service.lookups.queue_positions import CachedQueuePositions
from service.lookups.token_counter import TokenCounter
from service.maintenance.scheduler import Housekeeping
from service.maintenance.tasks import chores
from service.middleware import problems
from service.middleware.body_limit import BodyLimit
from service.middleware.host_check import HostCheck, OriginCheck
from service.middleware.request_log import Observed
from service.middleware.security_headers import SecurityHeaders
from service.monitoring.access import MetricsAccess
from service.monitoring.exposition import Exposition
from service.monitoring.readiness import Readiness
from service.schemas.video_url import LinkSigner
from service.settings import ServiceSettings

MAX_BODY_BYTES = 256 * 1024
"""Far above the longest prompt any model takes, even with every character escaped."""

_TAGS = [
    {"name": "jobs", "description": "Ask for videos, follow them, cancel them, fetch them."},
    {"name": "videos", "description": "The same, for clients of OpenAI's Videos API."},
    {"name": "models", "description": "What the live workers offer."},
    {"name": "operations", "description": "Metrics, workers and queues, for operators."},
    {"name": "health", "description": "For load balancers and operators."},
]


def create_app(settings: ServiceSettings) -> FastAPI:
    """Build the application. Redis is not needed until the first request.

    Raises:
        ArtifactRefused: ARTIFACTS_URL is not an address the service can serve, or its folder
            cannot be made.
    """
    redis_url = settings.redis_url.get_secret_value()
    redis = connect(redis_url)
    artifacts = open_artifacts(settings.artifacts_url)
    # That nobody offers anything is not kept: whoever saw the first worker come, at /readyz say,
    # may send it a job at once.
    offered = CachedValue(
        lambda: catalog.read(redis), settings.catalog_kept_s, lambda found: bool(found.offers)
    )
    places = CachedQueuePositions(QueuePositions(redis), offered)

    app = FastAPI(
        redirect_slashes=False,
        title="Text to video with Wan2.1",
        version=version("wan-hif8"),
        description="Asks resident workers for videos in `bf16` or `w8a8` (HiFloat8) and serves "
        "the results. Errors are problem documents (RFC 9457).",
        openapi_tags=_TAGS,
        lifespan=_lifespan,
    )
    exposition = Exposition(redis_url)
    gate = Gate(KeyStore(redis), RateLimiter(redis, settings.rate), may_be_open=settings.is_local)
    _build_wall(app, settings)
    app.add_middleware(Observed, measures=exposition.http)
    app.state.parts = AppState(
        settings=settings,
        redis=redis,
        store=JobStore(redis),
        outbox=Outbox(redis),
        catalog=offered,
        places=places,
        hub=EventHub(redis_url, places, settings.max_streams),
        readiness=Readiness(redis_url),
        artifacts=artifacts,
        tokens=TokenCounter(redis),
        gate=gate,
        admission=Admission(gate),
        exposition=exposition,
        readers=MetricsAccess(gate),
        signer=LinkSigner(redis, settings.url_secret, settings.url_ttl_s),
    )
    for routes in (jobs, events, videos, models, operations, health):
        app.include_router(routes.router)
    problems.install(app, {openai_errors.PREFIX: openai_errors.response})
    openapi.install(app, schemas=[openai_errors.ErrorAnswer], views=[VideoObject])
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    parts: AppState = app.state.parts
    housekeeping = Housekeeping(chores(parts))
    housekeeping.start()
    parts.hub.start()
    yield
    await parts.hub.stop()
    parts.readiness.close()
    parts.exposition.close()
    # Off the loop: a round in hand may take a moment.
    await run_in_threadpool(housekeeping.stop)
    parts.redis.close()


def _build_wall(app: FastAPI, settings: ServiceSettings) -> None:
    """Put the checks around the routes. Each goes around those before it: the last is met first."""
    app.add_middleware(BodyLimit, most_bytes=MAX_BODY_BYTES)
    app.add_middleware(OriginCheck, public_url=settings.public_url)
    if settings.is_local:
        app.add_middleware(HostCheck, names=settings.known_names)
    app.add_middleware(SecurityHeaders)
