"""What routes need, named once as `Annotated` aliases."""

from dataclasses import dataclass
from typing import Annotated, Any, cast

from fastapi import Depends, Request
from redis import Redis

from jobs import catalog
from jobs.artifacts import FolderArtifactStore
from jobs.store import JobStore
from service.json_body import json_body
from service.settings import ServiceSettings
from service.tokens import TokenCounter


@dataclass(frozen=True, slots=True)
class Parts:
    """What one application holds for its whole life."""

    settings: ServiceSettings
    redis: Redis
    store: JobStore
    artifacts: FolderArtifactStore
    tokens: TokenCounter


def _parts(request: Request) -> Parts:
    return cast("Parts", request.app.state.parts)


PartsDep = Annotated[Parts, Depends(_parts)]


def _store(parts: PartsDep) -> JobStore:
    return parts.store


def _artifacts(parts: PartsDep) -> FolderArtifactStore:
    return parts.artifacts


def _catalog(parts: PartsDep) -> catalog.Catalog:
    return catalog.read(parts.redis)


def _tokens(parts: PartsDep) -> TokenCounter:
    return parts.tokens


def _base_url(request: Request, parts: PartsDep) -> str:
    return parts.settings.public_url or str(request.base_url).rstrip("/")


StoreDep = Annotated[JobStore, Depends(_store)]
ArtifactsDep = Annotated[FolderArtifactStore, Depends(_artifacts)]
CatalogDep = Annotated[catalog.Catalog, Depends(_catalog)]
JsonBodyDep = Annotated[Any, Depends(json_body)]
TokensDep = Annotated[TokenCounter, Depends(_tokens)]
BaseUrlDep = Annotated[str, Depends(_base_url)]
