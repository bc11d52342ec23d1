"""Test that every error is in the table, and that every error answer is a problem document."""

import logging
from collections.abc import Iterator

import pytest
from fastapi.testclient import TestClient
from pydantic import SecretStr

from jobs.errors import AppError, InvalidSpec
from service.app import create_app
from service.middleware import problems
from service.settings import ServiceSettings


def tree(root: type[AppError] = AppError) -> Iterator[type[AppError]]:
    yield root
    for child in root.__subclasses__():
        yield from tree(child)


@pytest.mark.parametrize("error", list(tree()), ids=lambda e: e.__name__)
def test_every_error_is_in_the_table(error: type[AppError]) -> None:
    assert error in problems.STATUS_OF, (
        f"{error.__name__} has no status in service/middleware/problems.py"
    )
    made = InvalidSpec.of("f", 1, "2", "d") if error is InvalidSpec else error("d")
    problem = problems.from_error(made, "/x y")
    assert problem.code == error.code
    assert problem.title == error.title
    assert problem.status == problems.STATUS_OF[error]
    assert problem.type == f"urn:wan-hif8:problem:{error.code}"
    assert problem.instance == "/x%20y"


def test_table_has_nothing_else() -> None:
    assert set(problems.STATUS_OF) == set(tree())


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "not_found"),
        ("PUT", "/jobs", 405, "method_not_allowed"),
        ("GET", "/generate", 405, "method_not_allowed"),
        ("GET", "/jobs/a/b/c", 404, "not_found"),
        ("GET", "/jobs/", 404, "not_found"),
    ],
)
def test_plain_http_errors(
    client: TestClient, method: str, path: str, status: int, code: str
) -> None:
    answer = client.request(method, path)
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert answer.headers["content-type"] == "application/problem+json"
    if status == 405:
        assert answer.headers["allow"]


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/generate", "POST"),
        ("/jobs/a", "DELETE, GET, HEAD"),
        ("/jobs/a/video.mp4", "GET, HEAD"),
        ("/v1/videos", "GET, HEAD, POST"),
        ("/v1/videos/a", "DELETE, GET, HEAD"),
    ],
)
def test_405_names_every_method_of_the_path(client: TestClient, path: str, allowed: str) -> None:
    for method in ("PATCH", "OPTIONS"):
        answer = client.request(method, path)
        assert (answer.status_code, answer.headers["allow"]) == (405, allowed)


def test_unexpected_error_is_logged_and_hidden(
    settings: ServiceSettings, caplog: pytest.LogCaptureFixture
) -> None:
    app = create_app(settings)

    @app.get("/broken")
    def broken() -> None:
        raise RuntimeError("the secret of the service")

    with TestClient(app, raise_server_exceptions=False) as client, caplog.at_level(logging.ERROR):
        answer = client.get("/broken")
    assert answer.status_code == 500
    problem = answer.json()
    assert problem["code"] == "internal_error"
    assert "secret" not in answer.text
    reference = problem["detail"].split()[-1].rstrip(".")
    assert reference in caplog.text
    assert "the secret of the service" in caplog.text


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/jobs"),
        ("GET", "/jobs/a"),
        ("DELETE", "/jobs/a"),
        ("GET", "/jobs/a/video.mp4"),
        ("GET", "/models"),
        ("GET", "/readyz"),
        ("POST", "/generate"),
    ],
)
def test_redis_away_is_503(
    settings: ServiceSettings, unused_port: int, method: str, path: str
) -> None:
    url = SecretStr(f"redis://user:hidden@127.0.0.1:{unused_port}/0")
    away = settings.model_copy(update={"redis_url": url})
    with TestClient(create_app(away), raise_server_exceptions=False) as client:
        answer = client.request(method, path, json={"prompt": "x"} if method == "POST" else None)
        assert client.get("/healthz").status_code == 200
    assert (answer.status_code, answer.json()["code"]) == (503, "store_unavailable")
    assert answer.headers["retry-after"] == "5"
    assert str(unused_port) not in answer.text
