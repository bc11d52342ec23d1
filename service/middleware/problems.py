"""Answer every error with an RFC 9457 problem document; one table maps errors to statuses.

Routes raise `AppError`s. The handlers here turn them, FastAPI's validation errors, plain HTTP
errors, Redis errors and unexpected errors into `application/problem+json`, or into the format that
is registered for their path. Unexpected errors are logged, and the caller gets a reference to the
log.
"""

import logging
import secrets
from collections.abc import Callable, Mapping
from http import HTTPStatus
from types import MappingProxyType
from typing import Any, Final, cast
from urllib.parse import quote

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.routing import iter_route_contexts
from redis.exceptions import RedisError
from starlette.exceptions import HTTPException
from starlette.routing import compile_path

from jobs import errors
from jobs.state import JobState
from jobs.store.listing import LIMIT_BOUND
from jobs.violations import said, shown
from service.middleware.request_log import request_headers
from service.middleware.security_headers import security_headers
from service.schemas.problem import FieldProblem, Problem

logger = logging.getLogger(__name__)

MEDIA_TYPE: Final = "application/problem+json"
RETRY_AFTER_S: Final = 5

Renderer = Callable[[Problem, Mapping[str, str]], Response]
"""Makes the HTTP answer for a problem, with these headers, in another format."""

STATUS_OF: Final[Mapping[type[errors.AppError], HTTPStatus]] = MappingProxyType(
    {
        errors.AppError: HTTPStatus.INTERNAL_SERVER_ERROR,
        errors.InvalidSpec: HTTPStatus.UNPROCESSABLE_ENTITY,
        errors.JobNotFound: HTTPStatus.NOT_FOUND,
        errors.ComparisonNotFound: HTTPStatus.NOT_FOUND,
        errors.ComparisonConflict: HTTPStatus.CONFLICT,
        errors.RaterNotFound: HTTPStatus.NOT_FOUND,
        errors.ItemNotFound: HTTPStatus.NOT_FOUND,
        errors.AlreadyVoted: HTTPStatus.CONFLICT,
        errors.NothingToUndo: HTTPStatus.CONFLICT,
        errors.PairLeftOut: HTTPStatus.CONFLICT,
        errors.JobNotCancellable: HTTPStatus.CONFLICT,
        errors.JobAlreadyFinished: HTTPStatus.CONFLICT,
        errors.JobHeld: HTTPStatus.CONFLICT,
        errors.IdempotencyConflict: HTTPStatus.CONFLICT,
        errors.TooManyRequests: HTTPStatus.TOO_MANY_REQUESTS,
        errors.QueueFull: HTTPStatus.TOO_MANY_REQUESTS,
        errors.QuotaExceeded: HTTPStatus.TOO_MANY_REQUESTS,
        errors.RateLimited: HTTPStatus.TOO_MANY_REQUESTS,
        errors.TooManySignIns: HTTPStatus.TOO_MANY_REQUESTS,
        errors.TooManyOwnStreams: HTTPStatus.TOO_MANY_REQUESTS,
        errors.TooManyOwnDownloads: HTTPStatus.TOO_MANY_REQUESTS,
        errors.TooManyDownloads: HTTPStatus.SERVICE_UNAVAILABLE,
        errors.TooManyStreams: HTTPStatus.SERVICE_UNAVAILABLE,
        errors.Unauthenticated: HTTPStatus.UNAUTHORIZED,
        errors.Forbidden: HTTPStatus.FORBIDDEN,
        errors.LinkRefused: HTTPStatus.FORBIDDEN,
        errors.VideoNotReady: HTTPStatus.NOT_FOUND,
        errors.VideoGone: HTTPStatus.GONE,
        errors.PictureNotMade: HTTPStatus.NOT_FOUND,
        errors.NoPreview: HTTPStatus.NOT_FOUND,
        errors.ModeNotServed: HTTPStatus.SERVICE_UNAVAILABLE,
        errors.NoLiveWorker: HTTPStatus.SERVICE_UNAVAILABLE,
        errors.WorkerNotFound: HTTPStatus.NOT_FOUND,
        errors.KeyNotFound: HTTPStatus.NOT_FOUND,
        errors.KeyConflict: HTTPStatus.CONFLICT,
        errors.StoreUnavailable: HTTPStatus.SERVICE_UNAVAILABLE,
        errors.RecordUnreadable: HTTPStatus.INTERNAL_SERVER_ERROR,
        errors.ArtifactRefused: HTTPStatus.INTERNAL_SERVER_ERROR,
        errors.ArtifactsUnavailable: HTTPStatus.SERVICE_UNAVAILABLE,
        errors.StaleAttempt: HTTPStatus.CONFLICT,
        errors.GenerationCancelled: HTTPStatus.CONFLICT,
        errors.GenerationFailed: HTTPStatus.INTERNAL_SERVER_ERROR,
        errors.ArtifactNotStored: HTTPStatus.INTERNAL_SERVER_ERROR,
        errors.WorkerLost: HTTPStatus.INTERNAL_SERVER_ERROR,
        errors.WorkerUnfit: HTTPStatus.INTERNAL_SERVER_ERROR,
        errors.OutOfDeviceMemory: HTTPStatus.INTERNAL_SERVER_ERROR,
        errors.GenerationTimedOut: HTTPStatus.INTERNAL_SERVER_ERROR,
        errors.PromptTooLong: HTTPStatus.UNPROCESSABLE_ENTITY,
    }
)


def from_error(error: errors.AppError, path: str) -> Problem:
    """Build the problem document of `error` for a request to `path`."""
    extra = {name: error.context[name] for name in _SHOWN_CONTEXT if name in error.context}
    if isinstance(error, errors.InvalidSpec):
        extra["errors"] = [
            FieldProblem(field=v.field, value=v.value, bound=v.bound, detail=v.detail)
            for v in error.violations
        ]
    known = {"status": STATUS_OF[type(error)], "title": error.title, "code": error.code}
    return _problem(path, detail=error.detail, **known, **extra)


def response(app: FastAPI, problem: Problem, headers: Mapping[str, str] | None = None) -> Response:
    """Make the HTTP answer for a problem, in the format that callers of its path expect."""
    extra = dict(headers or {})
    if problem.status == HTTPStatus.SERVICE_UNAVAILABLE:
        extra["Retry-After"] = str(RETRY_AFTER_S)
    if problem.retry_after_s is not None:
        extra["Retry-After"] = str(problem.retry_after_s)
    if problem.status == HTTPStatus.UNAUTHORIZED:
        extra["WWW-Authenticate"] = "Bearer"
    renderers: Mapping[str, Renderer] = app.state.problem_renderers
    for prefix, render in renderers.items():
        if problem.instance == prefix or problem.instance.startswith(f"{prefix}/"):
            return render(problem, extra)
    content = problem.model_dump(mode="json", exclude_none=True)
    # Nulls are kept in refused fields: null means that a value was missing, or null itself.
    if problem.errors is not None:
        content["errors"] = [each.model_dump(mode="json") for each in problem.errors]
    return JSONResponse(content, problem.status, headers=extra, media_type=MEDIA_TYPE)


def from_status(status: int, detail: str, path: str) -> Problem:
    """Build the problem document of a plain HTTP error."""
    code, title = _PLAIN.get(status, (f"http_{status}", "The request was refused"))
    return _problem(path, status=status, title=title, code=code, detail=detail)


def install(app: FastAPI, renderers: Mapping[str, Renderer]) -> None:
    """Register the error handlers.

    Args:
        renderers: by path prefix, such as `/v1`: what makes the answers for paths under it.
    """
    app.state.problem_renderers = renderers
    app.add_exception_handler(errors.AppError, _on_app_error)
    app.add_exception_handler(RequestValidationError, _on_invalid_request)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(RedisError, _on_redis_error)
    app.add_exception_handler(Exception, _on_anything_else)


# Written out, because the standard library's phrases change with the Python version.
_PLAIN = {
    400: ("bad_request", "The request cannot be read"),
    404: ("not_found", "Nothing is found at this address"),
    405: ("method_not_allowed", "This address does not take this method"),
    412: ("precondition_failed", "The file is another one by now"),
    413: ("body_too_large", "The body is too large"),
    415: ("unsupported_media_type", "The body is in a format that is not taken"),
    416: ("range_not_satisfiable", "The range lies beyond the video"),
    421: ("misdirected_request", "This service is not known by that name"),
}
EVENT_ID_BOUND: Final = "the id of an event, like 1795360456040-0"
TIME_BOUND: Final = "a time with its zone, like 2026-11-22T14:14:16Z"
_PARAMETERS = {
    "limit": LIMIT_BOUND,
    "order": "asc or desc",
    "state": f"one of {', '.join(JobState)}",
    "all": "true or false",
    "purge": "true or false",
    "created_after": TIME_BOUND,
    "created_before": TIME_BOUND,
    "since": TIME_BOUND,
    "hours": "a whole number from 1 to 168",
    "Idempotency-Key": "1 to 255 visible ASCII characters",
    "Last-Event-ID": EVENT_ID_BOUND,
    "last_event_id": EVENT_ID_BOUND,
}
_LEVEL_OF: Final[Mapping[type[Exception], int]] = MappingProxyType(
    {
        # So it is at every start, until the first worker is ready.
        errors.NoLiveWorker: logging.INFO,
        errors.ModeNotServed: logging.WARNING,
        errors.TooManyStreams: logging.WARNING,
    }
)
"""At which level errors are logged that are answered with 5xx and are no fault of the service."""
_SHOWN_CONTEXT = ("job_id", "state", "served", "retry_after_s")


def _problem(path: str, **members: Any) -> Problem:
    return Problem(type=f"urn:wan-hif8:problem:{members['code']}", instance=quote(path), **members)


def rate_headers(error: errors.AppError) -> dict[str, str]:
    """Return the headers of the IETF's draft on rate limits, with the rate that was used up."""
    if not isinstance(error, errors.RateLimited) or "rate_amount" not in error.context:
        return {}
    context = error.context
    return {
        "RateLimit-Policy": f'"key";q={context["rate_amount"]};w={context["rate_window_s"]}',
        "RateLimit": f'"key";r=0;t={context["retry_after_s"]}',
    }


async def _on_app_error(request: Request, error: Exception) -> Response:
    problem = from_error(cast("errors.AppError", error), request.url.path)
    if problem.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        level = _LEVEL_OF.get(type(error), logging.ERROR)
        logger.log(level, "%s %s: %s", request.method, problem.instance, problem.detail)
    return response(request.app, problem, rate_headers(cast("errors.AppError", error)))


async def _on_invalid_request(request: Request, error: Exception) -> Response:
    """Answer a request with parameters of the wrong type; `jobs` checks bodies and their fields."""
    violations = []
    for each in cast("RequestValidationError", error).errors():
        field = ".".join(map(str, each["loc"][1:]))
        value = shown(each["input"])
        bound = _PARAMETERS.get(field, each["msg"])
        detail = f"{field} is {said(value)}, which is not {bound}."
        violations.append(errors.Violation(field, value, bound, detail))
    refused = errors.InvalidSpec(violations)
    return response(request.app, from_error(refused, request.url.path))


async def _on_http_error(request: Request, error: Exception) -> Response:
    error = cast("HTTPException", error)
    headers = dict(error.headers or {})
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        headers["Allow"] = allowed_methods(request)
    problem = from_status(error.status_code, str(error.detail), request.url.path)
    return response(request.app, problem, headers)


async def _on_redis_error(request: Request, error: Exception) -> Response:
    # The text of a Redis error may contain host names, so it is only logged.
    logger.error("Redis failed in %s %s: %r", request.method, quote(request.url.path), error)
    unavailable = errors.StoreUnavailable(
        "The job store cannot be reached or refuses to write; try again in a few seconds."
    )
    return response(request.app, from_error(unavailable, request.url.path))


async def _on_anything_else(request: Request, error: Exception) -> Response:
    reference = secrets.token_hex(4)
    logger.error(
        "Unexpected error %s in %s %s",
        reference,
        request.method,
        quote(request.url.path),
        exc_info=error,
    )
    hidden = errors.AppError(
        f"The service met an unexpected error; its log has the details under {reference}."
    )
    # This answer is sent outside of the middleware that adds these headers to all others.
    return response(
        request.app,
        from_error(hidden, request.url.path),
        {**security_headers(MEDIA_TYPE), **request_headers()},
    )


def methods_at(app: FastAPI, path: str) -> set[str]:
    """Collect the methods of every route to a path."""
    found: set[str] = set()
    for route in iter_route_contexts(app.routes):
        pattern, _, _ = compile_path(route.path or "")
        if route.methods and pattern.match(path):
            found |= set(route.methods)
    return found


def allowed_methods(request: Request) -> str:
    """List the methods that the request's path takes, for the Allow header."""
    found = methods_at(request.app, request.scope["path"])
    # See `service/middleware/head.py`.
    return ", ".join(sorted(found | ({"HEAD"} if "GET" in found else set())))
