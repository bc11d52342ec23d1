"""Serve the list of models that live workers offer."""

from fastapi import APIRouter

from service.api.deps import CatalogDep, PrincipalDep
from service.api.openapi import problems
from service.schemas.jobs import ModelListView

router = APIRouter(tags=["models"])


@router.get(
    "/models", summary="List models, modes and bounds", responses=problems(401, 422, 429, 503)
)
def list_models(_: PrincipalDep, catalog: CatalogDep) -> ModelListView:
    """List what the live workers offer: models, bounds, defaults, modes and devices."""
    return ModelListView.of(catalog)
