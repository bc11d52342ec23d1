"""Serve `/v1/models`: every mode that live workers offer, as a model of OpenAI's API."""

from dataclasses import asdict
from typing import Final, Literal

from fastapi import APIRouter, HTTPException
from pydantic import BaseModel, Field

from jobs.catalog import Catalog
from jobs.violations import shown
from service.api.deps import CatalogDep, KeyDep
from service.api.openai.openapi import errors

router = APIRouter(prefix="/v1/models", tags=["videos"])

OWNED_BY: Final = "wan-hif8"


class ModelObject(BaseModel):
    """A mode of a model. The keys from `mode` on are this service's own."""

    id: str = Field(description="MODEL:MODE; taken as `model` of a request.")
    object: Literal["model"] = "model"
    created: int = Field(description="Since when a live worker offers it, in Unix seconds.")
    owned_by: str = OWNED_BY
    mode: str
    description: str
    is_default: bool = Field(description="Whether the model runs in it if no mode is named.")
    min_steps: int = Field(description="Of `num_inference_steps`, as the next two.")
    max_steps: int
    default_steps: int
    max_guidance_scale: float = Field(description="Of `guidance_scale`; 1 is no guidance.")
    default_guidance_scale: float


class ModelList(BaseModel):
    """The models that live workers offer."""

    object: Literal["list"] = "list"
    data: list[ModelObject]


@router.get("", summary="List models and modes", responses=errors(401, 422, 429, 503))
def list_models(_: KeyDep, catalog: CatalogDep) -> ModelList:
    """List every mode of every model that a live worker offers; `GET /models` has the bounds."""
    return ModelList(data=_models(catalog))


@router.get("/{model}", summary="Read a model", responses=errors(401, 404, 422, 429, 503))
def read_model(_: KeyDep, model: str, catalog: CatalogDep) -> ModelObject:
    """Read one mode by its id."""
    for found in _models(catalog):
        if found.id == model:
            return found
    raise HTTPException(404, f"Model {shown(model)} is not served; GET /v1/models lists what is.")


def _models(catalog: Catalog) -> list[ModelObject]:
    found: dict[str, ModelObject] = {}
    for offer in sorted(catalog.offers, key=lambda offer: offer.started_at):
        for mode in offer.modes:
            name = f"{offer.model.name}:{mode.name}"
            each = ModelObject(
                id=name,
                created=int(offer.started_at.timestamp()),
                mode=mode.name,
                description=mode.description,
                is_default=mode.name == offer.model.default_mode,
                **asdict(offer.model.terms(mode)),
            )
            found.setdefault(name, each)
    return [found[name] for name in sorted(found)]
