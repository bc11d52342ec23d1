"""Define the dependencies of routes, as `Annotated` aliases."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated, Any, cast

from fastapi import Depends, Header, Query, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from redis import Redis
from starlette.concurrency import run_in_threadpool

from jobs.artifacts.known_store import KnownArtifactStore
from jobs.catalog import Catalog
from jobs.errors import Forbidden, LinkRefused
from jobs.store.job_store import JobStore
from jobs.store.webhook_outbox import Outbox
from service.api.downloads import Downloads
from service.api.events.hub import EventHub
from service.api.json_body import json_body
from service.api.known_query import refuse_unknown_parameters
from service.auth.admission import Admission
from service.auth.api_keys import Role
from service.auth.gate import Gate, Principal, listed_owner, refuse_raters, require_ops
from service.auth.seats import Seat
from service.auth.sessions import SessionStore
from service.comparisons.rating.desk import RatingDesk
from service.comparisons.rating.raters import RaterStore
from service.comparisons.rating.report import Reports
from service.comparisons.store import ComparisonStore
from service.lookups.cached import CachedValue
from service.lookups.queue_positions import CachedQueuePositions
from service.lookups.token_counter import TokenCounter
from service.middleware.credentials import sent_credential, sent_key
from service.monitoring.access import MetricsAccess
from service.monitoring.checks import Checks
from service.monitoring.exposition import Exposition
from service.monitoring.fleet_details import WaitingShapes
from service.monitoring.readiness import Readiness
from service.schemas.jobs import JobViews
from service.schemas.video_url import LinkSigner, VideoFile, VideoLinks, video_path
from service.settings import ServiceSettings


@dataclass(frozen=True, slots=True)
class AppState:
    """The objects that one application holds for its whole life."""

    settings: ServiceSettings
    redis: Redis
    store: JobStore
    outbox: Outbox
    catalog: CachedValue[Catalog]
    queue_positions: CachedQueuePositions
    hub: EventHub
    readiness: Readiness
    artifacts: KnownArtifactStore
    downloads: Downloads
    checks: Checks
    token_counter: TokenCounter
    gate: Gate
    sessions: SessionStore
    admission: Admission
    exposition: Exposition
    metrics_access: MetricsAccess
    link_signer: LinkSigner
    raters: RaterStore
    waiting_shapes: WaitingShapes
    desk: RatingDesk
    reports: Reports


def _app_state_of(request: Request) -> AppState:
    return cast("AppState", request.app.state.app_state)


async def _app_state(request: Request) -> AppState:
    return _app_state_of(request)


# Dependencies of nearly every request read the state from the request instead of depending on it:
# each dependency that FastAPI resolves costs some hundredths of a millisecond.
AppStateDep = Annotated[AppState, Depends(_app_state)]


async def _store(app_state: AppStateDep) -> JobStore:
    return app_state.store


async def _comparisons(app_state: AppStateDep) -> ComparisonStore:
    return ComparisonStore(app_state.redis)


async def _downloads(app_state: AppStateDep) -> Downloads:
    return app_state.downloads


async def _catalog(app_state: AppStateDep) -> Catalog:
    # Mostly the catalog is cached, and the thread pool is not needed.
    cached = app_state.catalog.fresh()
    return await run_in_threadpool(app_state.catalog.get) if cached is None else cached


def public_url(request: Request) -> str:
    """Return the URL under which this caller reaches the service."""
    configured = _app_state_of(request).settings.public_url
    return configured or str(request.base_url).rstrip("/")


async def _links(request: Request) -> VideoLinks:
    app_state = _app_state_of(request)
    return VideoLinks(
        public_url(request), app_state.link_signer, app_state.settings.retention_periods
    )


async def _job_views(request: Request) -> JobViews:
    app_state = _app_state_of(request)
    return JobViews(await _links(request), app_state.outbox, app_state.queue_positions)


_BEARER = HTTPBearer(
    scheme_name="key", description="An API key, `wan_...`.", bearerFormat="wan_", auto_error=False
)
BearerDep = Annotated[HTTPAuthorizationCredentials | None, Depends(_BEARER)]


# `_bearer` is there for the OpenAPI document, to which `service/api/openapi.py` adds the cookie.
async def _anybody(request: Request, _bearer: BearerDep) -> Principal:
    principal = await _app_state_of(request).admission.admit(sent_credential(request.headers))
    refuse_unknown_parameters(request)
    return principal


async def _principal(request: Request, bearer: BearerDep) -> Principal:
    return refuse_raters(await _anybody(request, bearer))


async def _key_principal(request: Request, _bearer: BearerDep) -> Principal:
    principal = await _app_state_of(request).admission.admit(sent_key(request.headers))
    refuse_unknown_parameters(request)
    return refuse_raters(principal)


AnybodyDep = Annotated[Principal, Depends(_anybody)]
PrincipalDep = Annotated[Principal, Depends(_principal)]


async def _seat(request: Request, principal: AnybodyDep) -> Seat:
    """Return the caller's seat: that of the link, or the one that the caller's key opens."""
    if principal.seat is not None:
        return principal.seat
    if principal.role is not Role.RATER:
        raise Forbidden(
            "Rating is for raters; open the link that those who run the comparison sent you."
        )
    raters = _app_state_of(request).raters
    seat = await run_in_threadpool(raters.seat_of_key, principal.owner)
    if seat is None:
        raise Forbidden(
            "Your key has no seat in any comparison; ask those who run it to add you, or open the "
            "link that they sent."
        )
    return seat


async def _public_url(request: Request) -> str:
    return public_url(request)


async def _ops(principal: PrincipalDep) -> Principal:
    return require_ops(principal)


async def _listed_owner(
    principal: PrincipalDep,
    owner: Annotated[str | None, Query(description="Only this key's jobs; for ops.")] = None,
) -> str | None:
    return listed_owner(principal, owner)


def _viewer(file: VideoFile) -> Callable[..., Awaitable[Principal | None]]:
    """Make the dependency that returns who asks for a file; None for a valid signed link to it."""

    async def viewer(
        job_id: str,
        request: Request,
        bearer: BearerDep,
        expires: Annotated[str | None, Query(description="Of a signed link: when it ends.")] = None,
        signature: Annotated[str | None, Query(description="Of a signed link.")] = None,
    ) -> Principal | None:
        if expires is not None or signature is not None:
            path = video_path(job_id, file)
            signer = _app_state_of(request).link_signer
            try:
                await run_in_threadpool(signer.check, path, expires or "", signature or "")
            except LinkRefused:
                # A caller who sends a key or a cookie as well does not need a link; it may be an
                # old one.
                if sent_credential(request.headers) is None:
                    raise
            else:
                refuse_unknown_parameters(request)
                return None
        return await _principal(request, bearer)

    return viewer


# The aliases that routes use. PrincipalDep admits everybody with a key or a session but raters,
# AnybodyDep raters, too; SeatDep only raters, KeyDep only with a key, OpsDep only ops.
SeatDep = Annotated[Seat, Depends(_seat)]
PublicUrlDep = Annotated[str, Depends(_public_url)]
KeyDep = Annotated[Principal, Depends(_key_principal)]
OpsDep = Annotated[Principal, Depends(_ops)]
ListedOwnerDep = Annotated[str | None, Depends(_listed_owner)]
ViewerDep = Annotated[Principal | None, Depends(_viewer(VideoFile.VIDEO))]
ThumbnailViewerDep = Annotated[Principal | None, Depends(_viewer(VideoFile.THUMBNAIL))]
SpritesheetViewerDep = Annotated[Principal | None, Depends(_viewer(VideoFile.SPRITESHEET))]
StoreDep = Annotated[JobStore, Depends(_store)]
ComparisonsDep = Annotated[ComparisonStore, Depends(_comparisons)]
DownloadsDep = Annotated[Downloads, Depends(_downloads)]
CatalogDep = Annotated[Catalog, Depends(_catalog)]
JsonBodyDep = Annotated[Any, Depends(json_body)]
JobViewsDep = Annotated[JobViews, Depends(_job_views)]
IdempotencyKeyDep = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        description="The same key with the same body means the same job for a day.",
        min_length=1,
        max_length=255,
        pattern="^[!-~]+$",
    ),
]
