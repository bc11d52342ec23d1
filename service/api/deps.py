"""What routes need, named once as `Annotated` aliases."""

from dataclasses import dataclass
from typing import Annotated, Any, cast

from fastapi import Depends, Header, Query, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from redis import Redis
from starlette.concurrency import run_in_threadpool

from jobs.artifacts.store import ArtifactStore
from jobs.catalog import Catalog
from jobs.errors import LinkRefused
from jobs.store.job_store import JobStore
from jobs.store.webhook_outbox import Outbox
from service.api.events.hub import EventHub
from service.api.json_body import json_body
from service.auth.admission import Admission
from service.auth.gate import Gate, Principal, listed_owner, require_ops
from service.lookups.cached import CachedValue
from service.lookups.queue_positions import CachedQueuePositions
from service.lookups.token_counter import TokenCounter
from service.monitoring.access import MetricsAccess
from service.monitoring.exposition import Exposition
from service.monitoring.readiness import Readiness
from service.schemas.jobs import JobViews
from service.schemas.video_url import LinkSigner, VideoLinks, video_path
from service.settings import ServiceSettings


@dataclass(frozen=True, slots=True)
class AppState:
    """What one application holds for its whole life."""

    settings: ServiceSettings
    redis: Redis
    store: JobStore
    outbox: Outbox
    catalog: CachedValue[Catalog]
    places: CachedQueuePositions
    hub: EventHub
    readiness: Readiness
    artifacts: ArtifactStore
    tokens: TokenCounter
    gate: Gate
    admission: Admission
    exposition: Exposition
    readers: MetricsAccess
    signer: LinkSigner


def _parts_of(request: Request) -> AppState:
    return cast("AppState", request.app.state.parts)


async def _parts(request: Request) -> AppState:
    return _parts_of(request)


# What nearly every request needs takes its parts from the request itself: each dependency that
# FastAPI resolves costs some hundredths of a millisecond.
AppStateDep = Annotated[AppState, Depends(_parts)]


async def _store(parts: AppStateDep) -> JobStore:
    return parts.store


async def _outbox(parts: AppStateDep) -> Outbox:
    return parts.outbox


async def _artifacts(parts: AppStateDep) -> ArtifactStore:
    return parts.artifacts


async def _catalog(parts: AppStateDep) -> Catalog:
    # Mostly there is nothing to read, and no need for the thread pool.
    kept = parts.catalog.fresh()
    return await run_in_threadpool(parts.catalog.get) if kept is None else kept


async def _tokens(parts: AppStateDep) -> TokenCounter:
    return parts.tokens


async def _links(request: Request) -> VideoLinks:
    parts = _parts_of(request)
    base_url = parts.settings.public_url or str(request.base_url).rstrip("/")
    return VideoLinks(base_url, parts.signer, parts.settings.keep)


async def _job_views(request: Request) -> JobViews:
    parts = _parts_of(request)
    return JobViews(await _links(request), parts.outbox, parts.places)


_BEARER = HTTPBearer(
    scheme_name="key", description="An API key, `wan_...`.", bearerFormat="wan_", auto_error=False
)
BearerDep = Annotated[HTTPAuthorizationCredentials | None, Depends(_BEARER)]


async def _principal(request: Request, bearer: BearerDep) -> Principal:
    return await _parts_of(request).admission.admit(None if bearer is None else bearer.credentials)


PrincipalDep = Annotated[Principal, Depends(_principal)]


async def _ops(principal: PrincipalDep) -> Principal:
    return require_ops(principal)


async def _listed_owner(
    principal: PrincipalDep,
    owner: Annotated[str | None, Query(description="Only this key's jobs; for ops.")] = None,
) -> str | None:
    return listed_owner(principal, owner)


async def _viewer(
    job_id: str,
    request: Request,
    bearer: BearerDep,
    expires: Annotated[str | None, Query(description="Of a signed link: when it ends.")] = None,
    signature: Annotated[str | None, Query(description="Of a signed link.")] = None,
) -> Principal | None:
    """Say who wants to see a video; None is whoever holds a sound link to it."""
    if expires is not None or signature is not None:
        signer = _parts_of(request).signer
        try:
            await run_in_threadpool(
                signer.check, video_path(job_id), expires or "", signature or ""
            )
        except LinkRefused:
            # Whoever shows a key as well may have kept an old link, and needs none.
            if bearer is None:
                raise
        else:
            return None
    return await _principal(request, bearer)


# The aliases: what a route writes. PrincipalDep admits everybody with a key, OpsDep only ops.
OpsDep = Annotated[Principal, Depends(_ops)]
ListedOwnerDep = Annotated[str | None, Depends(_listed_owner)]
ViewerDep = Annotated[Principal | None, Depends(_viewer)]
StoreDep = Annotated[JobStore, Depends(_store)]
OutboxDep = Annotated[Outbox, Depends(_outbox)]
ArtifactsDep = Annotated[ArtifactStore, Depends(_artifacts)]
CatalogDep = Annotated[Catalog, Depends(_catalog)]
JsonBodyDep = Annotated[Any, Depends(json_body)]
TokensDep = Annotated[TokenCounter, Depends(_tokens)]
LinksDep = Annotated[VideoLinks, Depends(_links)]
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
