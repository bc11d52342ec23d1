"""Read the body of a request as JSON, so that every error in it can be described.

FastAPI's own reader answers 400 without details to an integer of thousands of digits, which Python
refuses to convert. Here such a number is checked by its field like any other value.
"""

import json
from typing import Any, Final, TypeVar

from fastapi import HTTPException, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect

from jobs.errors import InvalidSpec
from jobs.violations import shown

_UNREADABLE: Final = "There was an error parsing the body: "
_NOT_JSON: Final = "The body is not JSON: "


Body = TypeVar("Body", bound=BaseModel)


class HugeInteger:
    """An integer too long to convert. No field accepts one, and `repr` shows its digits."""

    def __init__(self, digits: str) -> None:
        self._digits = digits

    def __repr__(self) -> str:
        return self._digits


async def json_body(request: Request) -> Any:
    """Read and parse the body.

    Raises:
        InvalidSpec: it is not JSON, or an object in it has a field twice.
        HTTPException: 415 if its content type is not JSON, or if it is compressed; 400 if it is not
            UTF-8 or nested too deeply, or if the caller disconnected.
    """
    refuse_encoded(request)
    if not _is_json(request.headers.get("content-type", "")):
        detail = "The body is not marked as JSON; send it with Content-Type: application/json."
        raise HTTPException(415, detail)
    try:
        return json.loads(
            await request.body(),
            parse_int=_integer,
            parse_constant=_refuse_constant,
            object_pairs_hook=_object,
        )
    except json.JSONDecodeError as error:
        # Some of these messages end with "at", for a place that follows.
        said = error.msg.removesuffix(" at")
        raise _not_json(f"{said} at character {error.pos}.") from error
    except UnicodeDecodeError as error:
        raise HTTPException(400, f"{_UNREADABLE}it is not UTF-8.") from error
    except RecursionError as error:
        raise HTTPException(400, f"{_UNREADABLE}it is nested too deeply.") from error
    except ClientDisconnect as error:
        raise HTTPException(400, f"{_UNREADABLE}it ended early.") from error


def parsed(model: type[Body], body: object) -> Body:
    """Check a parsed body against its model.

    Raises:
        RequestValidationError: has every field that is wrong; it is answered with 422.
    """
    try:
        return model.model_validate(body)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False)
        raise RequestValidationError(
            [{**each, "loc": ("body", *(each["loc"] or ("body",)))} for each in found]
        ) from None


def refuse_encoded(request: Request) -> None:
    """Refuse a compressed body. Raises HTTPException with status 415."""
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        detail = "The body is compressed or otherwise encoded; send it without Content-Encoding."
        raise HTTPException(415, detail, {"Accept-Encoding": "identity"})


def _not_json(why: str) -> InvalidSpec:
    return InvalidSpec.of("body", None, "a JSON object", _NOT_JSON + why)


def _refuse_constant(name: str) -> None:
    raise _not_json(f"{name} is no number in JSON; write a finite number, or leave the field out.")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of its fields. Of two with one name, readers disagree which counts."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        field = str(shown(twice))
        raise InvalidSpec.of(field, None, "one value", f"{field} is given twice; give it once.")
    return fields


def _is_json(content_type: str) -> bool:
    media_type = content_type.partition(";")[0].strip().lower()
    return media_type == "application/json" or (
        media_type.startswith("application/") and media_type.endswith("+json")
    )


def _integer(digits: str) -> int | HugeInteger:
    try:
        return int(digits)
    except ValueError:
        return HugeInteger(digits)
