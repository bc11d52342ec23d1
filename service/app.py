"""Build the FastAPI application from its settings.

Importing this module has no side effects; `create_app` builds an application.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cache
from importlib.metadata import version

from fastapi import APIRouter, FastAPI
from redis import Redis
from starlette.concurrency import run_in_threadpool
from starlette.routing import BaseRoute

from jobs import catalog
from jobs.artifacts.bucket import signed_origin
from jobs.artifacts.known_store import open_known_artifacts
from jobs.redis_client import connect
from jobs.store.job_store import JobStore
from jobs.store.queue_positions import QueuePositions
from jobs.store.webhook_outbox import Outbox
from jobs.telemetry import tracing
from service.api import openapi
from service.api.deps import AppState
from service.api.downloads import Downloads
from service.api.events.hub import EventHub
from service.api.openai import errors as openai_errors
from service.api.openai import models as openai_models
from service.api.openai import routes as videos
from service.api.openai.schemas import VideoObject
from service.api.routes import (
    comparison_results,
    comparisons,
    events,
    health,
    index,
    jobs,
    keys,
    models,
    operations,
    preview,
    rating,
    session,
)
from service.auth.admission import Admission
from service.auth.api_keys import KeyStore
from service.auth.gate import Gate
from service.auth.rate_limit import RateLimiter
from service.auth.sessions import SessionStore
from service.comparisons.rating.desk import RatingDesk
from service.comparisons.rating.raters import RaterStore
from service.comparisons.rating.report import Reports
from service.lookups.cached import CachedValue
from service.lookups.queue_positions import CachedQueuePositions
from service.lookups.token_counter import TokenCounter
from service.maintenance.scheduler import Scheduler
from service.maintenance.tasks import background_tasks
from service.middleware import problems
from service.middleware.body_limit import BodyLimit
from service.middleware.cors import Cors
from service.middleware.head import HeadAsGet
from service.middleware.host_check import HostCheck, OriginCheck
from service.middleware.request_log import RequestLog
from service.middleware.security_headers import SecurityHeaders
from service.monitoring.access import MetricsAccess
from service.monitoring.checks import Checks
from service.monitoring.exposition import Exposition
from service.monitoring.fleet_details import WaitingShapes
from service.monitoring.readiness import Readiness
from service.monitoring.tracing import telemetry
from service.pages import api_docs, page_routes, static_files
from service.schemas.keys import KeyBody, KeyChangesBody, RotateBody
from service.schemas.rating import JoinBody, RaterBody, SkipBody, VoteBody
from service.schemas.video_url import LinkSigner
from service.settings import ServiceSettings

MAX_BODY_BYTES = 256 * 1024
"""Far above the longest prompt any model takes, even with every character escaped."""

MAX_PROMPTS_BYTES = 4 * 1024 * 1024
"""For a new comparison: far above its 500 prompts, so that a file with too many is refused by what
is wrong with it, and not by its size."""

_TITLE = "Text to video with Wan2.1"
_VERSION = version("wan-hif8")
_TAGS = [
    {"name": "jobs", "description": "Ask for videos, follow them, cancel them, fetch them."},
    {"name": "videos", "description": "The same, for clients of OpenAI's Videos API."},
    {"name": "models", "description": "What the live workers offer."},
    {"name": "session", "description": "Sign in with an API key and a cookie, in a browser."},
    {"name": "rating", "description": "Judge pairs of videos blindly, for raters."},
    {"name": "comparisons", "description": "Blind comparisons of two modes, for operators."},
    {"name": "operations", "description": "Metrics, workers and queues, for operators."},
    {"name": "keys", "description": "API keys, for operators."},
    {"name": "health", "description": "For load balancers and operators."},
    {"name": "index", "description": "Where to find the rest."},
]


_API = (
    jobs,
    events,
    preview,
    videos,
    openai_models,
    models,
    session,
    comparisons,
    comparison_results,
    rating,
    operations,
    keys,
    health,
    index,
)
"""The modules with the routes of the API."""


def create_app(settings: ServiceSettings) -> FastAPI:
    """Build the application. Redis is not needed until the first request.

    Raises:
        ArtifactRefused: the service cannot use ARTIFACTS_URL, or cannot make its folder.
    """
    app_state = _app_state(settings)
    app = FastAPI(
        redirect_slashes=False,
        title=_TITLE,
        version=_VERSION,
        lifespan=_lifespan,
        docs_url=None,  # `service/pages/api_docs.py` serves it
        redoc_url=None,
        telemetry=telemetry(),
    )
    _add_middleware(app, settings)
    app.add_middleware(RequestLog, metrics=app_state.exposition.http)
    app.state.app_state = app_state
    app.router.routes.extend(_routes())
    app.openapi = _document  # type: ignore[method-assign]
    problems.install(app, {openai_errors.PREFIX: openai_errors.response})
    return app


@cache
def _routes() -> tuple[BaseRoute, ...]:
    """Return the routes of the API and of the pages, which all applications of a process share.

    FastAPI studies the parameters of all routes before the first request: 0.1 s of CPU time.
    """
    router = APIRouter()
    # Before the API: its routes match for browsers only, at addresses that are the API's, too.
    router.include_router(page_routes.shared_router)
    for routes in (*_API, api_docs, page_routes, static_files):
        router.include_router(routes.router)
    return tuple(router.routes)


@cache
def _document() -> openapi.Json:
    """Return the OpenAPI document, which all applications of a process share as well."""
    bodies = (KeyBody, KeyChangesBody, RotateBody, JoinBody, RaterBody, SkipBody, VoteBody)
    return openapi.document(
        _routes(),
        title=_TITLE,
        version=_VERSION,
        description="Asks resident workers for videos in `bf16` or `w8a8` (HiFloat8) and serves "
        "the results. Errors are problem documents (RFC 9457).",
        tags=_TAGS,
        schemas=[openai_errors.ErrorAnswer, *bodies],
        views=[VideoObject],
    )


def _app_state(settings: ServiceSettings) -> AppState:
    redis_url = settings.redis_url.get_secret_value()
    redis = connect(redis_url)
    artifacts = open_known_artifacts(settings.artifacts_url, redis)
    # An empty catalog is not cached: a caller who saw the first worker appear, at /readyz for
    # example, may send a job at once.
    cached_catalog = CachedValue(
        lambda: catalog.read(redis), settings.catalog_kept_s, lambda found: bool(found.offers)
    )
    queue_positions = CachedQueuePositions(QueuePositions(redis), cached_catalog)
    exposition = Exposition(redis_url)
    checks = Checks(redis, artifacts, settings.durability)
    exposition.add(checks)
    raters = RaterStore(redis)
    sessions = SessionStore(redis, raters)
    gate = _gate(settings, redis, sessions)
    return AppState(
        settings=settings,
        redis=redis,
        store=JobStore(redis, settings.durability),
        outbox=Outbox(redis),
        catalog=cached_catalog,
        queue_positions=queue_positions,
        hub=EventHub(redis_url, queue_positions, settings.max_streams),
        readiness=Readiness(redis_url),
        artifacts=artifacts,
        downloads=Downloads(artifacts, settings.max_downloads, redirect_s=settings.redirect_s),
        checks=checks,
        token_counter=TokenCounter(redis),
        gate=gate,
        sessions=sessions,
        admission=Admission(gate),
        exposition=exposition,
        metrics_access=MetricsAccess(gate),
        link_signer=LinkSigner(redis, settings.url_secret, settings.url_ttl_s),
        raters=raters,
        waiting_shapes=WaitingShapes(),
        desk=RatingDesk(redis),
        reports=Reports(redis),
    )


def _gate(settings: ServiceSettings, redis: Redis, sessions: SessionStore) -> Gate:
    return Gate(
        KeyStore(redis),
        RateLimiter(redis, settings.rate),
        sessions,
        may_be_open=settings.may_be_open,
        memory=settings.key_memory,
    )


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    app_state: AppState = app.state.app_state
    scheduler = Scheduler(background_tasks(app_state))
    scheduler.start()
    app_state.hub.start()
    yield
    await app_state.hub.stop()
    app_state.readiness.close()
    app_state.exposition.close()
    # In a thread: this waits for rounds under way.
    await run_in_threadpool(scheduler.stop)
    app_state.redis.close()
    # Here, because uvicorn may end the process by the signal that it got.
    await run_in_threadpool(tracing.stop)


def _add_middleware(app: FastAPI, settings: ServiceSettings) -> None:
    """Add the checks before the routes. The middleware that is added last runs first."""
    app.add_middleware(HeadAsGet)
    app.add_middleware(page_routes.VaryByAccept)
    app.add_middleware(
        BodyLimit, max_bytes=MAX_BODY_BYTES, larger={"/comparisons": MAX_PROMPTS_BYTES}
    )
    app.add_middleware(
        OriginCheck, public_url=settings.public_url, allowed_origins=settings.origins
    )
    if settings.is_local:
        app.add_middleware(HostCheck, names=settings.known_names)
    if settings.origins:
        # Around the checks, so that allowed pages can read why they are refused.
        app.add_middleware(Cors, origins=settings.origins)
    # Pages are to follow redirections, too.
    bucket = signed_origin(settings.artifacts_url) if settings.redirect_downloads else None
    app.add_middleware(SecurityHeaders, bucket=bucket)
