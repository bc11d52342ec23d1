"""Read the body of a request as JSON, so that every error in it can be described.

FastAPI's own reader answers 400 without details to an integer of thousands of digits, which Python
refuses to convert. Here such a number is checked by its field like any other value.
"""

import json
from typing import Any, Final

from fastapi import HTTPException, Request
from starlette.requests import ClientDisconnect

from jobs.errors import InvalidSpec

_UNREADABLE: Final = "There was an error parsing the body: "


class HugeInteger:
    """An integer too long to convert. No field accepts one, and `repr` shows its digits."""

    def __init__(self, digits: str) -> None:
        self._digits = digits

    def __repr__(self) -> str:
        return self._digits


async def json_body(request: Request) -> Any:
    """Read and parse the body.

    Raises:
        InvalidSpec: its content type is not JSON, or it is not JSON.
        HTTPException: 400 if it is not UTF-8 or nested too deeply, or if the caller disconnected.
    """
    if not _is_json(request.headers.get("content-type", "")):
        raise InvalidSpec.of(
            "body",
            None,
            "application/json",
            "The body is not marked as JSON; send it with Content-Type: application/json.",
        )
    try:
        return json.loads(await request.body(), parse_int=_integer)
    except json.JSONDecodeError as error:
        raise InvalidSpec.of(
            "body",
            None,
            "a JSON object",
            f"The body is not JSON: {error.msg} at character {error.pos}.",
        ) from error
    except UnicodeDecodeError as error:
        raise HTTPException(400, f"{_UNREADABLE}it is not UTF-8.") from error
    except RecursionError as error:
        raise HTTPException(400, f"{_UNREADABLE}it is nested too deeply.") from error
    except ClientDisconnect as error:
        raise HTTPException(400, f"{_UNREADABLE}it ended early.") from error


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
