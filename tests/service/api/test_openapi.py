"""Test that the OpenAPI document describes what the service does."""

import json
import re
from typing import Any

import pytest
from fastapi.testclient import TestClient
from pydantic import TypeAdapter

from jobs.catalog import WorkerOffer
from jobs.spec import GenerationBody
from service.api.openai.errors import ErrorAnswer
from service.api.openai.schemas import VideoObject
from service.schemas.jobs import JobView
from service.schemas.problem import Problem


@pytest.fixture
def document(client: TestClient) -> Any:
    return client.get("/openapi.json").json()


def operations(document: Any) -> list[tuple[str, Any]]:
    return [
        (f"{method.upper()} {path}", operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]


def test_all_routes_are_described(document: Any) -> None:
    found = dict(operations(document))
    assert set(found) == {
        "GET /",
        "POST /generate",
        "GET /jobs",
        "GET /jobs/{job_id}",
        "DELETE /jobs/{job_id}",
        "GET /jobs/{job_id}/events",
        "GET /jobs/{job_id}/preview.webp",
        "GET /jobs/{job_id}/video.mp4",
        "GET /jobs/{job_id}/thumbnail.webp",
        "GET /jobs/{job_id}/spritesheet.webp",
        "POST /v1/videos",
        "GET /v1/videos",
        "GET /v1/videos/{video_id}",
        "DELETE /v1/videos/{video_id}",
        "GET /v1/videos/{video_id}/content",
        "GET /v1/models",
        "GET /v1/models/{model}",
        "POST /comparisons",
        "GET /comparisons",
        "GET /comparisons/{comparison_id}",
        "DELETE /comparisons/{comparison_id}",
        "GET /comparisons/{comparison_id}/pairs",
        *(
            f"POST /comparisons/{{comparison_id}}/{verb}"
            for verb in ("pause", "resume", "close", "cancel", "retry", "clone")
        ),
        "POST /session",
        "GET /session",
        "DELETE /session",
        "GET /comparisons/{comparison_id}/raters",
        "POST /comparisons/{comparison_id}/raters",
        "POST /comparisons/{comparison_id}/raters/{rater_id}/link",
        "DELETE /comparisons/{comparison_id}/raters/{rater_id}",
        "GET /comparisons/{comparison_id}/report",
        "GET /comparisons/{comparison_id}/export.csv",
        "GET /comparisons/{comparison_id}/export.jsonl",
        "POST /rating/join",
        "GET /rating",
        "GET /rating/next",
        "GET /rating/items/{item}/{side}.mp4",
        "POST /rating/items/{item}/vote",
        "POST /rating/items/{item}/skip",
        "POST /rating/undo",
        "GET /models",
        "GET /metrics",
        "GET /workers",
        "POST /workers/{worker_id}/drain",
        "POST /workers/{worker_id}/resume",
        "GET /failures",
        "GET /series",
        "GET /keys",
        "POST /keys",
        "PATCH /keys/{name}",
        "POST /keys/{name}/rotate",
        "POST /keys/{name}/revoke",
        "GET /healthz",
        "GET /readyz",
    }
    assert all(each["tags"] and each["summary"] and each["description"] for each in found.values())


def test_every_error_has_its_shape_and_a_valid_example(document: Any) -> None:
    for name, operation in operations(document):
        errors = {int(s): a for s, a in operation["responses"].items() if int(s) >= 400}
        assert errors, name
        for status, answer in errors.items():
            if " /v1/" in name:
                assert list(answer["content"]) == ["application/json"], (name, status)
                content = answer["content"]["application/json"]
                assert content["schema"] == {"$ref": "#/components/schemas/ErrorAnswer"}
                ErrorAnswer.model_validate(content["example"])
                continue
            assert list(answer["content"]) == ["application/problem+json"], (name, status)
            content = answer["content"]["application/problem+json"]
            assert content["schema"] == {"$ref": "#/components/schemas/Problem"}
            assert Problem.model_validate(content["example"]).status == status


def test_the_cookie_is_described_where_it_is_taken(document: Any) -> None:
    schemes = document["components"]["securitySchemes"]
    assert (schemes["session"]["in"], schemes["session"]["name"]) == ("cookie", "wan_session")
    cookie: dict[str, list[str]] = {"session": []}
    key: dict[str, list[str]] = {"key": []}
    for name, operation in operations(document):
        security = operation.get("security", [])
        if name in ("POST /session", "POST /rating/join"):
            assert security == [{}, key]
        elif name == "DELETE /session":
            assert security == [{}, key, cookie]
        else:
            assert security.count(cookie) == (key in security and " /v1/" not in name), name
    with_cookie = [
        name for name, each in operations(document) if cookie in each.get("security", [])
    ]
    assert {"GET /session", "POST /generate", "GET /jobs/{job_id}/events"} <= set(with_cookie)
    assert "GET /healthz" not in with_cookie


def test_files_have_their_media_types_and_open_by_links(document: Any) -> None:
    paths = document["paths"]
    media_types = {
        "/jobs/{job_id}/video.mp4": ["video/mp4"],
        "/jobs/{job_id}/thumbnail.webp": ["image/webp"],
        "/jobs/{job_id}/spritesheet.webp": ["image/webp"],
        "/v1/videos/{video_id}/content": ["video/mp4", "image/webp"],
    }
    for path, expected in media_types.items():
        for status in ("200", "206"):
            assert list(paths[path]["get"]["responses"][status]["content"]) == expected
        by_link = {"link": []} in paths[path]["get"]["security"]
        assert by_link is path.startswith("/jobs/"), path
    (variant,) = (
        each
        for each in paths["/v1/videos/{video_id}/content"]["get"]["parameters"]
        if each["name"] == "variant"
    )
    assert variant["schema"]["enum"] == ["video", "thumbnail", "spritesheet"]


def test_references_resolve(document: Any) -> None:
    names = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(document)))
    assert names == set(document["components"]["schemas"])


def test_examples_are_valid(document: Any) -> None:
    content = document["paths"]["/generate"]["post"]["requestBody"]["content"]["application/json"]
    for example in content["examples"].values():
        GenerationBody.model_validate(example["value"])
    queued = document["paths"]["/generate"]["post"]["responses"]["202"]
    TypeAdapter(JobView).validate_json(json.dumps(queued["content"]["application/json"]["example"]))
    for example in document["components"]["schemas"]["JobView"]["examples"]:
        TypeAdapter(JobView).validate_json(json.dumps(example))
    for example in document["components"]["schemas"]["VideoObject"]["examples"]:
        VideoObject.model_validate(example)


@pytest.mark.usefixtures("live_worker")
def test_example_bodies_are_accepted(
    client: TestClient, document: Any, live_worker: WorkerOffer
) -> None:
    content = document["paths"]["/generate"]["post"]["requestBody"]["content"]["application/json"]
    for example in content["examples"].values():
        assert client.post("/generate", json=example["value"]).status_code == 202


@pytest.mark.usefixtures("live_worker")
def test_example_bodies_are_accepted_in_openais_shape(client: TestClient, document: Any) -> None:
    content = document["paths"]["/v1/videos"]["post"]["requestBody"]["content"]
    assert set(content) == {"application/json", "multipart/form-data"}
    for media_type, described in content.items():
        for example in described["examples"].values():
            assert set(example["value"]) <= set(described["schema"]["properties"])
            if media_type == "application/json":
                answer = client.post("/v1/videos", json=example["value"])
            else:
                parts = {name: (None, str(value)) for name, value in example["value"].items()}
                answer = client.post("/v1/videos", files=parts)
            assert answer.status_code == 200, answer.text
