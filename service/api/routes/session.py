"""Serve signing in and out: an API key is exchanged for a session in a cookie, for browsers."""

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from starlette.concurrency import run_in_threadpool

from jobs import redis_keys
from jobs.errors import InvalidSpec
from service.api.deps import AnybodyDep, AppStateDep, public_url
from service.api.json_body import json_body
from service.api.known_query import refuse_unknown_parameters
from service.api.openapi import SIGN_IN, SIGN_IN_ANSWER, SIGN_OUT, problems
from service.middleware.credentials import COOKIE, sent_credential, sent_key, sent_session
from service.middleware.host_check import SESSION_PATH
from service.middleware.request_log import client_address
from service.schemas.session import SessionView

router = APIRouter(tags=["session"])


@router.post(
    SESSION_PATH,
    summary="Sign in",
    response_description="Who has signed in.",
    responses={**SIGN_IN_ANSWER, **problems(400, 401, 403, 413, 415, 422, 429, 503)},
    openapi_extra=SIGN_IN,
)
async def sign_in(request: Request, app_state: AppStateDep, response: Response) -> SessionView:
    """Exchange a key for a session, whose id comes in a cookie that scripts cannot read.

    The key is the one in the body, or else that in `Authorization`. The session ends 12 hours after
    its last use, 7 days after the sign-in, or when its key does: with its revocation, its expiry,
    or the secret. A session that the caller had before is ended.
    """
    token = _key_in(await json_body(request)) if _has_body(request) else sent_key(request.headers)
    address = client_address(request.scope)
    principal, session = await run_in_threadpool(app_state.gate.sign_in, token, address)
    if session is not None:
        earlier = sent_session(request.headers)
        if earlier is not None:
            await run_in_threadpool(app_state.sessions.end, earlier)
        set_cookie(request, response, session.text, redis_keys.SESSION_LONGEST_S)
    return SessionView.of(principal)


@router.get(SESSION_PATH, summary="Who am I?", responses=problems(401, 422, 429, 503))
async def read_session(principal: AnybodyDep) -> SessionView:
    """Say whose key or session this is, and whether the service is open and needs neither."""
    return SessionView.of(principal)


@router.delete(
    SESSION_PATH,
    status_code=204,
    summary="Sign out",
    response_description="The session has ended, if there was one.",
    responses=problems(401, 403, 422, 429, 503),
    openapi_extra=SIGN_OUT,
)
async def sign_out(
    request: Request,
    app_state: AppStateDep,
    response: Response,
    everywhere: Annotated[
        bool, Query(alias="all", description="End every session of the caller's key.")
    ] = False,
) -> None:
    """End the session in the cookie, and remove the cookie; anybody may.

    With `all=true` every session of the caller's key ends; that needs a key or a session.
    """
    refuse_unknown_parameters(request)
    if everywhere:
        principal = await app_state.admission.admit(sent_credential(request.headers))
        await run_in_threadpool(app_state.sessions.end_all, principal.id)
    session = sent_session(request.headers)
    if session is not None:
        await run_in_threadpool(app_state.sessions.end, session)
        set_cookie(request, response, "", 0)


def _has_body(request: Request) -> bool:
    headers = request.headers
    return headers.get("content-length", "0") != "0" or "transfer-encoding" in headers


def _key_in(body: Any) -> str:
    """Return the key in a body. Errors do not repeat values: one of them may be the key."""
    if not isinstance(body, dict):
        raise InvalidSpec.of(
            "body", None, "a JSON object", 'The body is not a JSON object like {"key": "wan_..."}.'
        )
    if body.keys() - {"key"}:
        raise InvalidSpec.of(
            "body", None, "one field, key", "The body has other fields than key; leave them out."
        )
    key = body.get("key")
    if not isinstance(key, str):
        raise InvalidSpec.of(
            "key", None, "an API key as text", "key is missing or no text; send an API key in it."
        )
    return key


def set_cookie(request: Request, response: Response, text: str, max_age_s: int) -> None:
    """Set the session's cookie, or remove it with a `max_age_s` of 0."""
    response.set_cookie(
        COOKIE,
        text,
        max_age=max_age_s,
        path="/",
        # Browsers drop a Secure cookie that comes without TLS, unless the name is localhost.
        secure=public_url(request).startswith("https:"),
        httponly=True,
        samesite="lax",
    )
