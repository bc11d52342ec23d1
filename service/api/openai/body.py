"""Read the fields of `POST /v1/videos` from JSON or from a form; clients send one or the other.

Every value of a form is text. Fields that hold numbers are converted. Text that is not a number is
kept, so that the checks of its field refuse it.
"""

import re
from typing import Any, Final

from fastapi import HTTPException, Request
from starlette.datastructures import FormData, UploadFile
from starlette.requests import ClientDisconnect

from jobs.errors import InvalidSpec
from jobs.violations import shown
from service.api.json_body import json_body, refuse_encoded

FORM: Final = "multipart/form-data"
# More than there are fields, so that unknown fields can be named in the answer.
MAX_FORM_PARTS: Final = 64

_WHOLE_FIELDS: Final = frozenset({"seed", "num_inference_steps", "num_frames"})
_DECIMAL_FIELDS: Final = frozenset({"guidance_scale"})
_WHOLE: Final = re.compile(r"-?[0-9]{1,1000}", re.ASCII)
_DECIMAL: Final = re.compile(r"-?[0-9]{1,20}(\.[0-9]{1,20})?", re.ASCII)


class FormFile:
    """A file in a form. No field accepts one, so the checks of its field refuse it."""

    def __repr__(self) -> str:
        return "a file"


async def video_fields(request: Request) -> Any:
    """Read the body of a request: any JSON, or the fields of a form by name.

    Raises:
        InvalidSpec: a form or an object has a field twice, or the body is no JSON.
        HTTPException: 415 for a body that is marked as neither or is compressed; 400 for one that
            cannot be read.
    """
    refuse_encoded(request)
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != FORM:
        return await json_body(request)
    try:
        async with request.form(max_files=MAX_FORM_PARTS, max_fields=MAX_FORM_PARTS) as form:
            return _fields(form)
    except ClientDisconnect as error:
        raise HTTPException(400, "The form ended early.") from error
    except UnicodeError as error:
        raise HTTPException(400, "The form names an encoding its text is not in.") from error


def _fields(form: FormData) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in form.multi_items():
        if name in fields:
            field = str(shown(name))
            raise InvalidSpec.of(field, None, "one value", f"{field} is given twice; give it once.")
        fields[name] = FormFile() if isinstance(value, UploadFile) else _read(name, value)
    return fields


def _read(name: str, text: str) -> str | int | float:
    if name in _WHOLE_FIELDS and _WHOLE.fullmatch(text):
        return int(text)
    if name in _DECIMAL_FIELDS and _DECIMAL.fullmatch(text):
        return float(text)
    return text
