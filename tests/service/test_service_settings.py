"""Settings from the environment: defaults, names, and refusals in clear words."""

import pytest
from pydantic import ValidationError

from service.settings import ServiceSettings

NAMES = ("SERVICE_HOST", "SERVICE_PORT", "SERVICE_PUBLIC_URL", "REDIS_URL", "ARTIFACTS_URL")


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ARTIFACTS_URL", "file:///videos")


def test_defaults() -> None:
    settings = ServiceSettings()
    assert (settings.host, settings.port, settings.public_url) == ("127.0.0.1", 8000, None)
    assert settings.redis_url.get_secret_value() == "redis://127.0.0.1:6379/0"


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVICE_HOST", "::1")
    monkeypatch.setenv("SERVICE_PORT", "0")
    monkeypatch.setenv("SERVICE_PUBLIC_URL", "https://video.example/api/")
    monkeypatch.setenv("REDIS_URL", "rediss://:secret@redis.example:6380/1")
    settings = ServiceSettings()
    assert (settings.host, settings.port) == ("::1", 0)
    assert settings.public_url == "https://video.example/api"
    assert "secret" not in repr(settings)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("SERVICE_HOST", "0.0.0.0", "no authentication yet"),
        ("SERVICE_HOST", "::", "no authentication yet"),
        ("SERVICE_HOST", "192.168.1.5", "no authentication yet"),
        ("SERVICE_HOST", "example.org", "no authentication yet"),
        ("SERVICE_PORT", "65536", "65535"),
        ("SERVICE_PORT", "http", "integer"),
        ("SERVICE_PUBLIC_URL", "video.example", "web address"),
        ("SERVICE_PUBLIC_URL", "ftp://video.example", "web address"),
        ("REDIS_URL", "localhost:6379", "redis://"),
        ("REDIS_URL", "http://localhost", "redis://"),
    ],
)
def test_bad_values(monkeypatch: pytest.MonkeyPatch, name: str, value: str, reason: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ValidationError, match=reason) as refused:
        ServiceSettings()
    assert refused.value.errors()[0]["loc"] == (name,)


def test_empty_variables_count_as_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SERVICE_HOST", "SERVICE_PORT", "SERVICE_PUBLIC_URL", "REDIS_URL"):
        monkeypatch.setenv(name, "")
    settings = ServiceSettings()
    assert (settings.host, settings.port, settings.public_url) == ("127.0.0.1", 8000, None)
    assert settings.redis_url.get_secret_value() == "redis://127.0.0.1:6379/0"
    monkeypatch.setenv("ARTIFACTS_URL", "")
    with pytest.raises(ValidationError, match="ARTIFACTS_URL"):
        ServiceSettings()


def test_artifacts_are_required(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ARTIFACTS_URL")
    with pytest.raises(ValidationError, match="ARTIFACTS_URL"):
        ServiceSettings()
