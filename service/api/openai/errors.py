"""Convert problem documents to OpenAI's error format, for every answer under `/v1`.

Statuses are those of `service/middleware/problems.py`, except where OpenAI's API uses another one.
OpenAI's clients repeat a request by themselves after 408, 409, 429 and 5xx.
"""

from collections.abc import Mapping
from http import HTTPStatus
from types import MappingProxyType
from typing import Final

from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from service.schemas.problem import Problem

PREFIX: Final = "/v1"

_OPENAI_STATUS: Final[Mapping[int, int]] = MappingProxyType(
    {
        HTTPStatus.UNPROCESSABLE_ENTITY: HTTPStatus.BAD_REQUEST,
        HTTPStatus.GONE: HTTPStatus.NOT_FOUND,
    }
)
_TYPE_OF: Final[Mapping[int, str]] = MappingProxyType(
    {
        HTTPStatus.UNAUTHORIZED: "authentication_error",
        HTTPStatus.FORBIDDEN: "permission_error",
        HTTPStatus.NOT_FOUND: "not_found_error",
        HTTPStatus.CONFLICT: "conflict_error",
        HTTPStatus.TOO_MANY_REQUESTS: "rate_limit_error",
    }
)


class ErrorObject(BaseModel):
    """The description of an error."""

    message: str = Field(examples=["There is no job 01a2."])
    type: str = Field(description="The kind of error.", examples=["not_found_error"])
    param: str | None = Field(default=None, description="The first refused field or parameter.")
    code: str = Field(description="Stable, for programs.", examples=["job_not_found"])


class ErrorAnswer(BaseModel):
    """The body of every answer that is an error."""

    error: ErrorObject


def status_of(problem: Problem) -> int:
    """Return the HTTP status that OpenAI's clients expect for a problem."""
    return _OPENAI_STATUS.get(problem.status, problem.status)


def answer_of(problem: Problem) -> ErrorAnswer:
    """Convert a problem document to OpenAI's error object."""
    status = status_of(problem)
    is_server_error = status >= HTTPStatus.INTERNAL_SERVER_ERROR
    default_type = "server_error" if is_server_error else "invalid_request_error"
    return ErrorAnswer(
        error=ErrorObject(
            message=problem.detail,
            type=_TYPE_OF.get(status, default_type),
            param=problem.errors[0].field if problem.errors else None,
            code=problem.code,
        )
    )


def response(problem: Problem, headers: Mapping[str, str]) -> JSONResponse:
    """Make the HTTP answer for a problem."""
    extra = dict(headers)
    if problem.status == HTTPStatus.CONFLICT:
        # A conflict stays a conflict, however often the request is repeated.
        extra["X-Should-Retry"] = "false"
    return JSONResponse(answer_of(problem).model_dump(), status_of(problem), headers=extra)
