"""What can be generated now."""

from fastapi import APIRouter

from service.deps import CatalogDep, PrincipalDep
from service.openapi import problems
from service.views import ModelListView

router = APIRouter(tags=["models"])


@router.get("/models", summary="List models, modes and bounds", responses=problems(401, 429, 503))
def list_models(_: PrincipalDep, catalog: CatalogDep) -> ModelListView:
    """List what the live workers offer: models, bounds, defaults, modes and devices."""
    return ModelListView.of(catalog)
