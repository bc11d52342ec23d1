"""Build the OpenAPI document, with problem documents under their own media type and examples.

FastAPI describes errors as `application/json` and adds its own 422 to every route with parameters.
Both are corrected here, after FastAPI has built the document.
"""

from collections.abc import Sequence
from typing import Any

from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from starlette.routing import BaseRoute

from jobs import errors
from jobs.spec import GenerationBody
from service.comparisons.creation import ComparisonBody
from service.middleware.credentials import COOKIE
from service.middleware.problems import MEDIA_TYPE, from_error, from_status
from service.schemas.jobs import QUEUED_EXAMPLE, EventView, JobListView, JobView
from service.schemas.problem import Problem
from service.schemas.session import SignInBody
from service.schemas.video_url import VideoFile, video_path

Json = dict[str, Any]

_REF = "#/components/schemas/{model}"

GENERATE_BODY: Json = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {"$ref": _REF.format(model="GenerationBody")},
                "examples": {
                    "short": {
                        "summary": "A prompt; everything else by default",
                        "value": {
                            "prompt": "a small red circle moving right on a black background"
                        },
                    },
                    "full": {
                        "summary": "Every choice made",
                        "value": {
                            "prompt": "a large blue square moving up on a white background",
                            "negative_prompt": "",
                            "mode": "w8a8",
                            "size": "96x96",
                            "num_frames": 17,
                            "num_inference_steps": 20,
                            "guidance_scale": 4.0,
                            "seed": 7,
                            "model": "wan-mini",
                        },
                    },
                },
            }
        },
    }
}

GENERATE_ANSWER: dict[int | str, Json] = {
    202: {
        "headers": {
            "Location": {
                "description": "The job's address.",
                "schema": {"type": "string", "examples": ["/jobs/01a2"]},
            },
            "Idempotent-Replayed": {
                "description": "There, and true, when an earlier request with the same "
                "Idempotency-Key made the job.",
                "schema": {"type": "string", "enum": ["true"]},
            },
        },
    }
}

COMPARISON_BODY: Json = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {"$ref": _REF.format(model="ComparisonBody")},
                "example": {
                    "title": "Is w8a8 as good as bf16?",
                    "reference": {"mode": "bf16"},
                    "candidate": {"mode": "w8a8"},
                    "prompts": ["a small red circle moving right on a black background"],
                    "seeds": 2,
                },
            }
        },
    }
}
COMPARISON_ANSWER: dict[int | str, Json] = {
    201: {
        "headers": {
            "Location": {
                "description": "The comparison's address.",
                "schema": {"type": "string", "examples": ["/comparisons/01a2"]},
            }
        }
    }
}

SIGN_IN: Json = {
    "requestBody": {
        "required": False,
        "description": "Or send the key as `Authorization: Bearer wan_...`.",
        "content": {"application/json": {"schema": {"$ref": _REF.format(model="SignInBody")}}},
    },
    "security": [{}, {"key": []}],
}
SIGN_OUT: Json = {"security": [{}, {"key": []}, {"session": []}]}
_SET_COOKIE: Json = {
    "description": f"The session: `{COOKIE}`, HttpOnly. Not on an open service, which needs none.",
    "schema": {"type": "string"},
}
SIGN_IN_ANSWER: dict[int | str, Json] = {200: {"headers": {"Set-Cookie": _SET_COOKIE}}}

KEY_TAKEN = errors.IdempotencyConflict(
    "This Idempotency-Key was used for another request, which made job 01a2; use a new key for a "
    "new request.",
    job_id="01a2",
)

EVENT_ANSWER: dict[int | str, Json] = {
    # FastAPI describes the model; `_EVENTS` below describes the stream.
    200: {"model": EventView, "description": "The events, until the job ends."},
    204: {"description": "The job has ended, and the caller has seen its last event."},
}
_EVENTS_PATH = "/jobs/{job_id}/events"
_LINKED_PATHS = tuple(video_path("{job_id}", file) for file in VideoFile)
_EVENTS: Json = {
    "text/event-stream": {
        # As in OpenAPI 3.2, which can describe streams.
        "itemSchema": {
            "type": "object",
            "properties": {
                "event": {"type": "string", "enum": ["state", "progress", "preview", "queue"]},
                "id": {"type": "string", "description": "Not with queue."},
                "retry": {"type": "integer", "minimum": 0},
                "data": {
                    "type": "string",
                    "contentMediaType": "application/json",
                    "contentSchema": {
                        "anyOf": [
                            {"$ref": _REF.format(model="EventView")},
                            {"$ref": _REF.format(model="QueueView")},
                        ]
                    },
                },
            },
        },
        "example": "event: queue\n"
        'data: {"position":0,"starts_in_s":3.5}\n\n'
        "event: progress\n"
        'data: {"id":"01a2","state":"running","attempts":1,"at":"2026-11-22T14:14:18.040Z",'
        '"progress":{"stage":"denoise","step":4,"steps":20,"seconds_left":5.9}}\n'
        "id: 1795360458040-0\n\n",
    }
}

_BINARY: Json = {"schema": {"type": "string", "format": "binary"}}


def _file_responses(*media_types: str) -> dict[int | str, Json]:
    content = dict.fromkeys(media_types, _BINARY)
    return {
        200: {"description": "The whole file.", "content": content},
        206: {
            "description": "The range asked for; several ranges get the whole file.",
            "content": content,
        },
        304: {"description": "The caller already has it."},
        307: {"description": "The file is in a bucket, where `Location` says."},
    }


VIDEO_RESPONSES = _file_responses("video/mp4")
PICTURE_RESPONSES = _file_responses("image/webp")
PREVIEW_RESPONSES: dict[int | str, Json] = {
    200: {"description": "The newest preview.", "content": {"image/webp": _BINARY}},
    304: {"description": "The caller already has it."},
}
ANY_FILE_RESPONSES = _file_responses("video/mp4", "image/webp")

_CANCEL_TOO_LATE = "Job 01a2 has already succeeded; only queued and running jobs can be cancelled."
_FRAMES = "num_frames is 16, which is not 4k+1 from 5 to 17."
_NOT_SERVED = "No live worker serves mode w8a8 of model wan-mini. Served now: wan-mini: bf16."
_NO_KEY = "This needs an API key; send it as `Authorization: Bearer wan_...`."
_FOREIGN = "The request comes from a page of another site, which may not change anything here."
_TOO_OFTEN = "This key may send 600 requests in 60 s and has sent them; come back in 3 s."
_HIDDEN = "The service met an unexpected error; its log has the details under 5f0c9a2b."


def _examples() -> dict[int, Problem]:
    """Build an example for each status, with the code that answers real errors."""
    path = "/jobs/01a2"
    served = [{"model": "wan-mini", "modes": ["bf16"]}]
    invalid = errors.InvalidSpec.of("num_frames", 16, "4k+1 from 5 to 17", _FRAMES)
    found = [
        from_status(400, "There was an error parsing the body", path),
        from_error(errors.Unauthenticated(_NO_KEY), path),
        from_error(errors.Forbidden(_FOREIGN), path),
        from_error(errors.JobNotFound("There is no job 01a2.", job_id="01a2"), path),
        from_error(errors.JobNotCancellable(_CANCEL_TOO_LATE, job_id="01a2"), path),
        from_error(errors.VideoGone("The video is no longer stored.", job_id="01a2"), path),
        from_status(412, "The video is not the one that If-Match asks for.", path),
        from_status(413, "The body is larger than 262144 bytes.", "/generate"),
        from_status(
            415,
            "The body is not marked as JSON; send it with Content-Type: application/json.",
            "/generate",
        ),
        from_status(416, "The Range header asks for bytes beyond the end of the file.", path),
        from_error(invalid, "/generate"),
        from_error(errors.RateLimited(_TOO_OFTEN, retry_after_s=3), path),
        from_error(errors.AppError(_HIDDEN), path),
        from_error(errors.ModeNotServed(_NOT_SERVED, served=served), "/generate"),
    ]
    return {problem.status: problem for problem in found}


def body_of(model: str, *, required: bool = True) -> Json:
    """Describe the body of a route that reads it by itself; `install` gets the model."""
    schema = {"schema": {"$ref": _REF.format(model=model)}}
    return {"requestBody": {"required": required, "content": {"application/json": schema}}}


def problems(*statuses: int) -> dict[int | str, Json]:
    """Describe a route's error answers, with 500, because any route may fail unexpectedly."""
    examples = _examples()
    answers: dict[int | str, Json] = {}
    for status in sorted({*statuses, 500}):
        answers[status] = _answer(examples[status])
    return answers


def problem(error: errors.AppError, path: str) -> dict[int | str, Json]:
    """Describe an error answer with another example than the usual one of its status."""
    example = from_error(error, path)
    return {example.status: _answer(example)}


def _answer(problem: Problem) -> Json:
    example = problem.model_dump(mode="json", exclude_none=True)
    schema = {"$ref": _REF.format(model="Problem")}
    return {
        "description": problem.title,
        "content": {MEDIA_TYPE: {"schema": schema, "example": example}},
    }


def document(
    routes: Sequence[BaseRoute],
    schemas: Sequence[type[BaseModel]] = (),
    views: Sequence[type[BaseModel]] = (),
    **about: Any,
) -> Json:
    """Build the document.

    Args:
        schemas: further models that routes refer to without FastAPI's knowledge.
        views: further models whose examples hold nulls.
        about: title, version, description and tags.
    """
    document = get_openapi(routes=routes, **about)
    described = document["components"]["schemas"]
    for name in ("HTTPValidationError", "ValidationError"):
        described.pop(name, None)
    models: list[type[BaseModel]] = [
        GenerationBody,
        ComparisonBody,
        SignInBody,
        Problem,
        *schemas,
    ]
    for model in models:
        schema = model.model_json_schema(ref_template=_REF)
        described.update(schema.pop("$defs", {}))
        described[model.__name__] = schema
    # FastAPI drops nulls from examples, which would make these examples invalid.
    with_nulls: list[type[BaseModel]] = [JobView, JobListView, *views]
    for view in with_nulls:
        described[view.__name__]["examples"] = view.model_json_schema()["examples"]
    document["paths"][_EVENTS_PATH]["get"]["responses"]["200"]["content"] = _EVENTS
    _describe_links(document)
    _describe_cookie(document)
    accepted = document["paths"]["/generate"]["post"]["responses"]["202"]
    accepted["content"]["application/json"]["example"] = QUEUED_EXAMPLE
    for path in document["paths"].values():
        for operation in path.values():
            answer = operation["responses"].get("422", {})
            if "application/json" in answer.get("content", {}):
                del operation["responses"]["422"]
    return document


def _describe_links(document: Json) -> None:
    """Describe signed links as a security scheme of the routes that send videos and pictures."""
    document["components"]["securitySchemes"]["link"] = {
        "type": "apiKey",
        "in": "query",
        "name": "signature",
        "description": "Part of a signed link, as in a job's `video.url`.",
    }
    for path in _LINKED_PATHS:
        document["paths"][path]["get"]["security"].append({"link": []})


def _describe_cookie(document: Json) -> None:
    """Describe the session's cookie as a scheme of all routes with a key, but not of `/v1`."""
    document["components"]["securitySchemes"]["session"] = {
        "type": "apiKey",
        "in": "cookie",
        "name": COOKIE,
        "description": "Set by `POST /session`. Anything but reading also needs the header "
        "`Sec-Fetch-Site: same-origin` or the service's own `Origin`, as browsers send them.",
    }
    for path, operations in document["paths"].items():
        for operation in operations.values():
            schemes = operation.get("security", [])
            if {"key": []} in schemes and {} not in schemes and not path.startswith("/v1/"):
                schemes.append({"session": []})
