"""What routes need, named once as `Annotated` aliases."""

from dataclasses import dataclass
from typing import Annotated, Any, cast

from fastapi import Depends, Query, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from redis import Redis
from starlette.concurrency import run_in_threadpool

from jobs import catalog
from jobs.artifacts import ArtifactStore
from jobs.errors import LinkRefused
from jobs.outbox import Outbox
from jobs.places import Places
from jobs.store import JobStore
from service.auth import LOCAL, Gate, Principal, listed_owner, require_ops
from service.json_body import json_body
from service.links import LinkSigner, VideoLinks, video_path
from service.settings import ServiceSettings
from service.tokens import TokenCounter


@dataclass(frozen=True, slots=True)
class Parts:
    """What one application holds for its whole life."""

    settings: ServiceSettings
    redis: Redis
    store: JobStore
    outbox: Outbox
    places: Places
    artifacts: ArtifactStore
    tokens: TokenCounter
    gate: Gate
    signer: LinkSigner


async def _parts(request: Request) -> Parts:
    return cast("Parts", request.app.state.parts)


PartsDep = Annotated[Parts, Depends(_parts)]


async def _store(parts: PartsDep) -> JobStore:
    return parts.store


async def _outbox(parts: PartsDep) -> Outbox:
    return parts.outbox


async def _artifacts(parts: PartsDep) -> ArtifactStore:
    return parts.artifacts


def _catalog(parts: PartsDep) -> catalog.Catalog:
    return catalog.read(parts.redis)


async def _tokens(parts: PartsDep) -> TokenCounter:
    return parts.tokens


async def _links(request: Request, parts: PartsDep) -> VideoLinks:
    base_url = parts.settings.public_url or str(request.base_url).rstrip("/")
    return VideoLinks(base_url, parts.signer, parts.settings.keep)


_BEARER = HTTPBearer(
    scheme_name="key", description="An API key, `wan_...`.", bearerFormat="wan_", auto_error=False
)
BearerDep = Annotated[HTTPAuthorizationCredentials | None, Depends(_BEARER)]


async def _principal(parts: PartsDep, bearer: BearerDep) -> Principal:
    # An open service does without a visit to the thread pool.
    if parts.gate.is_open:
        return LOCAL
    token = None if bearer is None else bearer.credentials
    return await run_in_threadpool(parts.gate.admit, token)


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
    parts: PartsDep,
    bearer: BearerDep,
    expires: Annotated[str | None, Query(description="Of a signed link: when it ends.")] = None,
    signature: Annotated[str | None, Query(description="Of a signed link.")] = None,
) -> Principal | None:
    """Say who wants to see a video; None is whoever holds a sound link to it."""
    if expires is not None or signature is not None:
        try:
            await run_in_threadpool(
                parts.signer.check, video_path(job_id), expires or "", signature or ""
            )
        except LinkRefused:
            # Whoever shows a key as well may have kept an old link, and needs none.
            if bearer is None:
                raise
        else:
            return None
    return await _principal(parts, bearer)


# The aliases: what a route writes. PrincipalDep admits everybody with a key, OpsDep only ops.
OpsDep = Annotated[Principal, Depends(_ops)]
ListedOwnerDep = Annotated[str | None, Depends(_listed_owner)]
ViewerDep = Annotated[Principal | None, Depends(_viewer)]
StoreDep = Annotated[JobStore, Depends(_store)]
OutboxDep = Annotated[Outbox, Depends(_outbox)]
ArtifactsDep = Annotated[ArtifactStore, Depends(_artifacts)]
CatalogDep = Annotated[catalog.Catalog, Depends(_catalog)]
JsonBodyDep = Annotated[Any, Depends(json_body)]
TokensDep = Annotated[TokenCounter, Depends(_tokens)]
LinksDep = Annotated[VideoLinks, Depends(_links)]
