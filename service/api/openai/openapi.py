"""Describe `/v1/videos` in the OpenAPI document."""

from typing import Any, Final

from jobs.spec import GenerationBody
from service.api.openai.body import FORM
from service.api.openai.errors import ErrorAnswer, answer_of, status_of
from service.api.openai.request import PASSED_ON, SECONDS_PATTERN
from service.api.openapi import GENERATE_ANSWER, KEY_TAKEN, problem, problems
from service.middleware.problems import MEDIA_TYPE
from service.schemas.problem import Problem

Json = dict[str, Any]
Answers = dict[int | str, Json]

POLL_HEADER: Final = "openai-poll-after-ms"

VIDEO_ANSWER: Final[Answers] = {
    200: {
        "headers": {
            POLL_HEADER: {
                "description": "When to ask again, in milliseconds, if the job has not ended.",
                "schema": {"type": "string", "pattern": "^[0-9]+$", "examples": ["1000"]},
            }
        }
    }
}

_NULL: Final[Json] = {"type": "null"}
_MODEL: Final[Json] = {
    "anyOf": [{"type": "string"}, _NULL],
    "description": "A mode (w8a8), a model (wan-mini, in its default mode), or both "
    "(wan-mini:w8a8). May be left out while one model is served.",
}
_SECONDS: Final[Json] = {
    "anyOf": [
        {"type": "string", "pattern": SECONDS_PATTERN},
        {"type": "number", "minimum": 0, "maximum": 999_999},
        _NULL,
    ],
    "description": "How long the video lasts: frames per second times seconds, plus one, has to be "
    "a count of frames that the model takes. Not together with num_frames.",
}
_EXAMPLES: Final[Json] = {
    "short": {
        "summary": "A prompt; everything else by default",
        "value": {"prompt": "a small red circle moving right on a black background"},
    },
    "full": {
        "summary": "Every choice made",
        "value": {
            "prompt": "a large blue square moving up on a white background",
            "model": "wan-mini:w8a8",
            "seconds": "2",
            "size": "96x96",
            "negative_prompt": "",
            "num_inference_steps": 20,
            "guidance_scale": 4.0,
            "seed": 7,
        },
    },
}


def errors(*statuses: int) -> Answers:
    """Describe a route's error answers; `statuses` are this service's own, not yet OpenAI's."""
    return _in_openai_format(problems(*statuses))


def create_answers() -> Answers:
    """Describe the answers of `POST /v1/videos`, apart from the object itself."""
    replayed = "Idempotent-Replayed"
    headers = {replayed: GENERATE_ANSWER[202]["headers"][replayed]}
    return {
        200: {"headers": VIDEO_ANSWER[200]["headers"] | headers},
        **errors(400, 401, 403, 413, 415, 422, 429, 503),
        **_in_openai_format(problem(KEY_TAKEN, "/v1/videos")),
    }


def video_body() -> Json:
    """Describe the body of `POST /v1/videos`, as JSON and as a form."""
    described = GenerationBody.model_json_schema()["properties"]
    # The fields of `POST /generate`, except those that OpenAI's API names differently.
    fields = {name: described[name] for name in PASSED_ON}
    fields |= {"model": _MODEL, "seconds": _SECONDS}
    in_form = {name: _without_null(schema) for name, schema in fields.items()}
    content = {
        "application/json": {"schema": _object_of(fields), "examples": _EXAMPLES},
        FORM: {"schema": _object_of(in_form), "examples": _EXAMPLES},
    }
    return {"requestBody": {"required": True, "content": content}}


def _object_of(fields: Json) -> Json:
    return {
        "type": "object",
        "properties": fields,
        "required": ["prompt"],
        "additionalProperties": False,
    }


def _without_null(schema: Json) -> Json:
    """Return the schema for a form, which has no null: there the field is left out instead."""
    choices = [each for each in schema.get("anyOf", []) if each != _NULL]
    rest = {name: value for name, value in schema.items() if name not in ("anyOf", "default")}
    return rest | (choices[0] if len(choices) == 1 else {"anyOf": choices} if choices else {})


def _in_openai_format(described: Answers) -> Answers:
    schema = {"$ref": f"#/components/schemas/{ErrorAnswer.__name__}"}
    answers: Answers = {}
    for each in described.values():
        error = Problem.model_validate(each["content"][MEDIA_TYPE]["example"])
        answers[status_of(error)] = {
            "description": each["description"],
            "content": {
                "application/json": {"schema": schema, "example": answer_of(error).model_dump()}
            },
        }
    return answers
