"""Serve the API keys to operators: list, make, change, rotate, revoke.

The same is done by `python -m service keys`, with the same code (`service/auth/api_keys.py`).
"""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request

from jobs.errors import KeyConflict
from service.api.deps import AppStateDep, JsonBodyDep, OpsDep
from service.api.json_body import json_body
from service.api.openapi import body_of, problem, problems
from service.auth import audit
from service.auth.api_keys import ApiKey, KeyStore, Role
from service.auth.gate import Principal
from service.auth.key_terms import parse_span
from service.schemas.keys import (
    KeyBody,
    KeyChangesBody,
    KeyListView,
    KeyView,
    MadeKeyView,
    RotateBody,
    changed_terms,
    read_body,
)

router = APIRouter(tags=["keys"])

_CONFLICT = KeyConflict(
    "The key of alice is the last usable one of the role ops. Make another first, or use `python "
    "-m service keys`."
)
_PROBLEMS = {
    **problems(400, 401, 403, 404, 409, 413, 415, 422, 429, 503),
    **problem(_CONFLICT, "/keys/alice"),
}


def _key_store(principal: OpsDep, app_state: AppStateDep) -> KeyStore:
    return KeyStore(app_state.redis, by=principal.id)


async def _rotate_body(request: Request, _: OpsDep) -> Any:
    """Read the body of a rotation, which may be missing."""
    return await json_body(request) if await request.body() else {}


KeyStoreDep = Annotated[KeyStore, Depends(_key_store)]
RotateBodyDep = Annotated[Any, Depends(_rotate_body)]


@router.get("/keys", summary="List the API keys", responses=problems(401, 403, 422, 429, 503))
def list_keys(principal: OpsDep, store: KeyStoreDep, app_state: AppStateDep) -> KeyListView:
    """List all keys, the revoked ones too, without their secrets."""
    used = store.last_uses()
    return KeyListView(
        keys=[KeyView.of(key, principal.id, used.get(key.id)) for key in store.all()],
        roles=list(Role),
        default_quota=app_state.settings.quota,
        default_rate=app_state.settings.rate,
    )


@router.post(
    "/keys",
    status_code=201,
    summary="Make an API key",
    response_description="The key; its secret is shown only this once.",
    responses=_PROBLEMS,
    openapi_extra=body_of("KeyBody"),
)
def make_key(principal: OpsDep, raw: JsonBodyDep, store: KeyStoreDep) -> MadeKeyView:
    """Make a key. On a service without keys the first one has to be of the role ops."""
    body = read_body(KeyBody, raw)
    made, token = store.add(
        body.name, body.role, body.quota, body.rate, owner=body.owner, expires_at=body.expires
    )
    audit.note(principal, f"made the key of {_described(made)}")
    return MadeKeyView.of(made, principal.id, None, key=token)


@router.patch(
    "/keys/{name}",
    summary="Change an API key",
    responses=_PROBLEMS,
    openapi_extra=body_of("KeyChangesBody"),
)
def change_key(principal: OpsDep, name: str, raw: JsonBodyDep, store: KeyStoreDep) -> KeyView:
    """Change what a key may do, by its name or id; every process knows it within two seconds.

    What is left out stays; null is the service's default, or for `expires` never.
    """
    changed = store.change(name, **changed_terms(read_body(KeyChangesBody, raw)))
    audit.note(principal, f"changed the key of {_described(changed)}")
    return _view(principal, store, changed)


@router.post(
    "/keys/{name}/rotate",
    summary="Give an API key another secret",
    response_description="The key with its new secret, which is shown only this once.",
    responses=_PROBLEMS,
    openapi_extra=body_of("RotateBody", required=False),
)
def rotate_key(principal: OpsDep, name: str, raw: RotateBodyDep, store: KeyStoreDep) -> MadeKeyView:
    """Replace the secret; the old one stays valid for the `grace`, by default not at all.

    The sessions that were made with the old secret end with it.
    """
    grace = parse_span(read_body(RotateBody, raw).grace)
    rotated, token = store.rotate(name, grace)
    audit.note(principal, f"rotated the key of {_described(rotated)} with a grace of {grace}")
    return MadeKeyView.of(rotated, principal.id, store.last_uses().get(rotated.id), key=token)


@router.post("/keys/{name}/revoke", summary="Revoke an API key", responses=_PROBLEMS)
def revoke_key(principal: OpsDep, name: str, store: KeyStoreDep) -> KeyView:
    """Revoke a key for good, by its name or id; it is refused within two seconds."""
    revoked = store.revoke(name)
    audit.note(principal, f"revoked the key of {_described(revoked)}")
    return _view(principal, store, revoked)


def _view(principal: Principal, store: KeyStore, key: ApiKey) -> KeyView:
    return KeyView.of(key, principal.id, store.last_uses().get(key.id))


def _described(key: ApiKey) -> str:
    limits = f"quota {key.quota or 'default'}, rate {key.rate or 'default'}"
    until = "never" if key.expires_at is None else f"{key.expires_at:%Y-%m-%d %H:%M}Z"
    owner = f", owner {key.owner_name}" if key.owner is not None else ""
    return f"{key.name} (id {key.id}, role {key.role}, {limits}, expires {until}{owner})"
