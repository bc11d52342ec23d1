"""Test settings from the environment: defaults, names, and clear error messages."""

import pytest
from pydantic import ValidationError

from service.server import describe_errors
from service.settings import ServiceSettings, origin_of

NAMES = (
    *("SERVICE_HOST", "SERVICE_PORT", "SERVICE_PUBLIC_URL", "REDIS_URL", "ARTIFACTS_URL"),
    *("SERVICE_URL_SECRET", "SERVICE_URL_TTL_S", "SERVICE_RATE", "SERVICE_QUOTA"),
    *("SERVICE_MAX_WAITING", "SERVICE_ALLOWED_ORIGINS"),
)


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
    monkeypatch.setenv("REDIS_URL", "rediss://:hidden@redis.example:6380/1")
    monkeypatch.setenv("SERVICE_URL_SECRET", "hidden" * 6)
    monkeypatch.setenv("SERVICE_RATE", "5/second")
    settings = ServiceSettings()
    assert (settings.host, settings.port) == ("::1", 0)
    assert settings.public_url == "https://video.example/api"
    assert settings.url_secret is not None
    assert settings.url_secret.get_secret_value() == "hidden" * 6
    assert settings.rate == "5/second"
    assert "hidden" not in repr(settings)


@pytest.mark.parametrize(
    ("host", "local"),
    [
        *((each, True) for each in ("127.0.0.1", "::1", "localhost", "127.8.8.8")),
        *((each, False) for each in ("0.0.0.0", "::", "192.168.1.5", "localhost.example")),
    ],
)
def test_which_hosts_are_this_machine(
    monkeypatch: pytest.MonkeyPatch, host: str, local: bool
) -> None:
    monkeypatch.setenv("SERVICE_HOST", host)
    assert ServiceSettings().is_local is local


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("SERVICE_URL_SECRET", "x" * 31, "32"),
        ("SERVICE_URL_TTL_S", "0", "greater than or equal to 1"),
        ("SERVICE_RATE", "often", "not a rate; write it like"),
        ("SERVICE_RATE", "0/second", "not a rate; write it like"),
        ("SERVICE_RATE", "5/minute;1/second", "not a rate; write it like"),
        ("SERVICE_QUOTA", "0", "greater than or equal to 1"),
        ("SERVICE_MAX_WAITING", "none", "integer"),
        ("SERVICE_PORT", "65536", "65535"),
        ("SERVICE_PORT", "http", "integer"),
        ("SERVICE_PUBLIC_URL", "video.example", "web address"),
        ("SERVICE_PUBLIC_URL", "ftp://video.example", "web address"),
        ("SERVICE_PUBLIC_URL", "https://video.example/#top", "web address"),
        ("SERVICE_PUBLIC_URL", "https://video.example/?", "web address"),
        ("SERVICE_PUBLIC_URL", "https://video.example:http", "web address"),
        ("SERVICE_PUBLIC_URL", "https://video.example:70000", "web address"),
        ("SERVICE_PUBLIC_URL", "https://:443", "web address"),
        ("SERVICE_PUBLIC_URL", "https://[video", "web address"),
        ("SERVICE_ALLOWED_ORIGINS", "*", "every site"),
        ("SERVICE_ALLOWED_ORIGINS", "https://app.example, *", "every site"),
        ("SERVICE_ALLOWED_ORIGINS", "app.example", "not an origin as browsers send it"),
        ("SERVICE_ALLOWED_ORIGINS", "null", "not an origin"),
        ("SERVICE_ALLOWED_ORIGINS", "https://*.app.example", "name each origin"),
        ("SERVICE_ALLOWED_ORIGINS", "https://app.example/", "not an origin"),
        ("SERVICE_ALLOWED_ORIGINS", "https://app.example/a", "not an origin"),
        ("SERVICE_ALLOWED_ORIGINS", "https://app.example:443", "not an origin"),
        ("SERVICE_ALLOWED_ORIGINS", "http://app.example:80", "not an origin"),
        ("SERVICE_ALLOWED_ORIGINS", "https://App.example", "not an origin"),
        ("SERVICE_ALLOWED_ORIGINS", "https://me@app.example", "not an origin"),
        ("SERVICE_ALLOWED_ORIGINS", "file:///app", "not an origin"),
        ("SERVICE_RATE", "10 per 2 day", "for a second to a day"),
        ("SERVICE_RATE", "1/99999999999999 year", "for a second to a day"),
        ("REDIS_URL", "localhost:6379", "redis://"),
        ("REDIS_URL", "http://localhost", "redis://"),
    ],
)
def test_bad_values(monkeypatch: pytest.MonkeyPatch, name: str, value: str, reason: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ValidationError, match=reason) as refused:
        ServiceSettings()
    assert refused.value.errors()[0]["loc"] == (name,)


@pytest.mark.parametrize(
    "url", ["redis://:s3cr/et@localhost:6379/0", "redis://localhost:s3cret", "redis://[s3cret"]
)
def test_a_redis_url_that_cannot_be_read_is_not_shown(
    monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    monkeypatch.setenv("REDIS_URL", url)
    with pytest.raises(ValidationError) as refused:
        ServiceSettings()
    (line,) = describe_errors(refused.value).splitlines()
    assert line.startswith("service: REDIS_URL: it cannot be read as redis://")
    assert "s3c" not in line


def test_a_lone_comma_is_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    for text in (",", " , ", " "):
        monkeypatch.setenv("SERVICE_WEBHOOK_SECRET", text)
        with pytest.raises(ValidationError, match="it is not whsec_"):
            ServiceSettings()


def test_empty_variables_count_as_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in set(NAMES) - {"ARTIFACTS_URL"}:
        monkeypatch.setenv(name, "")
    settings = ServiceSettings()
    assert (settings.host, settings.port, settings.public_url) == ("127.0.0.1", 8000, None)
    assert settings.redis_url.get_secret_value() == "redis://127.0.0.1:6379/0"
    monkeypatch.setenv("ARTIFACTS_URL", "")
    with pytest.raises(ValidationError, match="ARTIFACTS_URL"):
        ServiceSettings()


def test_allowed_origins_are_separated_by_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ServiceSettings().origins == frozenset()
    monkeypatch.setenv("SERVICE_ALLOWED_ORIGINS", "https://app.example, http://[::1]:3000,")
    assert ServiceSettings().origins == {"https://app.example", "http://[::1]:3000"}


@pytest.mark.parametrize(
    ("url", "origin"),
    [
        ("https://Video.example:443/api", "https://video.example"),
        ("http://video.example:8000", "http://video.example:8000"),
        ("http://video.example:443", "http://video.example:443"),
        ("http://[::1]:80/", "http://[::1]"),
    ],
)
def test_the_origin_of_an_address(url: str, origin: str) -> None:
    assert origin_of(url) == origin


def test_artifacts_are_required(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ARTIFACTS_URL")
    with pytest.raises(ValidationError, match="ARTIFACTS_URL"):
        ServiceSettings()
