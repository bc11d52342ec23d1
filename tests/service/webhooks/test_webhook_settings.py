"""Test the settings of webhooks, and which of them prevent the start."""

import base64
from collections.abc import Callable

import pytest
from pydantic import ValidationError

from service.server import describe_errors
from service.settings import ServiceSettings
from service.webhooks.settings import SECRET_BYTES

Read = Callable[..., ServiceSettings]


def secret(size: int = 32) -> str:
    return "whsec_" + base64.b64encode(b"\xfb" * size).decode()


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Read:
    """Read the settings from an environment with these variables."""

    def read(**variables: str) -> ServiceSettings:
        for name, value in {"ARTIFACTS_URL": "file:///x", **variables}.items():
            monkeypatch.setenv(name, value)
        return ServiceSettings()

    return read


HOSTS = {"SERVICE_WEBHOOK_HOSTS": "a.example.com"}
SECRET = {"SERVICE_WEBHOOK_SECRET": secret()}
URL = {"SERVICE_PUBLIC_URL": "https://video.example.com"}


def test_nobody_is_called_by_default(read: Read) -> None:
    assert read().webhook_rules.hosts == ()
    assert read(SERVICE_WEBHOOK_HOSTS="").webhook_rules.hosts == ()


def test_read_from_the_environment(read: Read) -> None:
    found = read(
        **URL,
        SERVICE_WEBHOOK_HOSTS="hooks.example.com, *.example.org:8443,127.0.0.1:9000",
        SERVICE_WEBHOOK_PRIVATE="1",
        SERVICE_WEBHOOK_HTTP="1",
        SERVICE_WEBHOOK_SECRET=f"{secret()},{secret(64)}",
    )
    assert found.webhook_secrets == (secret(), secret(64))
    assert found.webhook_rules.private
    for url in ("https://hooks.example.com/", "http://127.0.0.1:9000/"):
        assert found.webhook_rules.violation(url) is None
    assert secret() not in repr(found)


@pytest.mark.parametrize(
    ("variables", "where", "reason"),
    [
        ({**HOSTS, **URL}, ("SERVICE_WEBHOOK_HOSTS",), "SERVICE_WEBHOOK_SECRET is missing"),
        ({**HOSTS, **SECRET}, (), "SERVICE_PUBLIC_URL is missing"),
        ({**SECRET, "SERVICE_WEBHOOK_HOSTS": "a/b"}, ("SERVICE_WEBHOOK_HOSTS",), "'a/b' is not"),
        (
            {**SECRET, "SERVICE_WEBHOOK_HOSTS": "10.0.0.1"},
            ("SERVICE_WEBHOOK_HOSTS",),
            "SERVICE_WEBHOOK_PRIVATE",
        ),
    ],
)
def test_what_is_missing_or_wrong_is_named(
    read: Read, variables: dict[str, str], where: tuple[str, ...], reason: str
) -> None:
    with pytest.raises(ValidationError) as refused:
        read(**variables)
    found = {error["loc"]: error["msg"] for error in refused.value.errors()}
    assert reason in found[where]
    assert reason in describe_errors(refused.value)


@pytest.mark.parametrize(
    "bad",
    [
        base64.b64encode(b"x" * 32).decode(),
        "whsec_not-base64",
        secret(SECRET_BYTES[0] - 1),
        secret(SECRET_BYTES[-1] + 1),
        secret()[:-1],
        f"{secret()},short",
    ],
)
def test_weak_secrets_are_refused_and_not_repeated(read: Read, bad: str) -> None:
    with pytest.raises(ValidationError, match="SERVICE_WEBHOOK_SECRET") as refused:
        read(**HOSTS, **URL, SERVICE_WEBHOOK_SECRET=bad)
    assert bad not in str(refused.value)
