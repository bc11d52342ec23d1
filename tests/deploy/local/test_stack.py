"""Test what the stack gives its processes, when it is ready, and when it stops restarting."""

import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import typer.main
from redis import Redis

from deploy.local.cli import app
from deploy.local.errors import Interrupted, LocalError
from deploy.local.ports import LOOPBACK, require_free
from deploy.local.signals import Signals
from deploy.local.stack import WORKER_CONFIG, Stack, StackConfig
from jobs import catalog
from jobs.catalog import WorkerOffer
from service.settings import ServiceSettings
from service.webhooks.settings import SECRET_PREFIX
from tests.support.http_service import serving
from worker.settings import WorkerSettings

SECRET = f"{SECRET_PREFIX}{'A' * 32}"
PUBLIC = {"SERVICE_PUBLIC_URL": "https://videos.example"}
HOOKS = {"SERVICE_WEBHOOK_HOSTS": "hooks.example", "SERVICE_WEBHOOK_SECRET": SECRET}
VARIABLES = sorted(
    str(field.validation_alias)
    for settings in (ServiceSettings, WorkerSettings)
    for field in settings.model_fields.values()
    if str(field.validation_alias).startswith(("SERVICE_", "WORKER_"))
)
OPTIONS = {"SERVICE_HOST": "host", "SERVICE_PORT": "port", "WORKER_CONFIG": "config"}
"""The variables that are options of the demo, because the launcher has to know them as well."""


def stack_config(folder: Path, *, private: bool = False) -> StackConfig:
    return StackConfig(folder, 8000, 6379, WORKER_CONFIG, private=private)


@pytest.mark.parametrize("name", VARIABLES)
def test_every_setting_reaches_the_processes_of_the_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "81")
    if name in OPTIONS:
        command = typer.main.get_command(app).commands["demo"]  # type: ignore[attr-defined]
        with command.make_context("demo", []) as context:
            assert str(context.params[OPTIONS[name]]) == "81"
    else:
        assert stack_config(tmp_path).environment()[name] == "81"


def test_the_port_of_make_wins_over_the_one_of_the_service(monkeypatch: pytest.MonkeyPatch) -> None:
    command = typer.main.get_command(app).commands["demo"]  # type: ignore[attr-defined]
    monkeypatch.setenv("SERVICE_PORT", "8001")
    for value, port in (("", 8001), ("8002", 8002)):  # make exports an empty one if none is given
        monkeypatch.setenv("DEMO_PORT", value)
        with command.make_context("demo", []) as context:
            assert context.params["port"] == port


def test_a_demo_with_webhooks_knows_its_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in HOOKS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SERVICE_PUBLIC_URL", raising=False)
    environment = stack_config(tmp_path).environment()
    assert environment["SERVICE_PUBLIC_URL"] == "http://127.0.0.1:8000"
    monkeypatch.setattr("os.environ", environment)
    assert ServiceSettings().webhook_hosts == "hooks.example"  # it takes them so
    monkeypatch.setenv("SERVICE_PUBLIC_URL", PUBLIC["SERVICE_PUBLIC_URL"])
    config = stack_config(tmp_path)
    assert config.environment() | PUBLIC == config.environment()


def test_make_generate_serves_itself_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own download follows the links, which must not lead to another service."""
    for name, value in (HOOKS | PUBLIC | {"SERVICE_RATE": "5/second"}).items():
        monkeypatch.setenv(name, value)
    environment = stack_config(tmp_path, private=True).environment()
    assert not (HOOKS | PUBLIC).keys() & environment.keys()
    assert environment["SERVICE_RATE"] == "5/second"


@pytest.mark.parametrize(
    ("host", "url"),
    [
        (LOOPBACK, "http://127.0.0.1:8000"),
        ("0.0.0.0", "http://127.0.0.1:8000"),
        ("::", "http://127.0.0.1:8000"),
        ("::1", "http://[::1]:8000"),
        ("192.0.2.7", "http://192.0.2.7:8000"),
    ],
)
def test_the_service_is_reached_where_it_listens(tmp_path: Path, host: str, url: str) -> None:
    config = StackConfig(tmp_path, 8000, 6379, WORKER_CONFIG, host=host)
    assert config.environment()["SERVICE_HOST"] == host
    assert config.service_url == url


@pytest.mark.parametrize("port", [-1, 0, 65536])
def test_what_is_no_port_is_refused(port: int) -> None:
    with pytest.raises(LocalError, match=f"^{port} is not a port: PORT takes 1 to 65535$"):
        require_free(port, "service", "PORT")


def test_the_offer_of_an_earlier_worker_does_not_make_it_ready(
    tmp_path: Path, redis: Redis, settings: ServiceSettings, offer: WorkerOffer
) -> None:
    now = datetime.now(UTC)
    old = offer.model_copy(update={"worker_id": "old", "started_at": now - timedelta(seconds=5)})
    catalog.publish(redis, old)
    with serving(settings.model_copy(update={"public_url": None})) as site:
        port = int(site.url.rpartition(":")[2])
        stack = Stack(StackConfig(tmp_path, port, 1, WORKER_CONFIG), Signals())
        assert not stack._is_ready()
        new = offer.model_copy(update={"started_at": now + timedelta(seconds=5)})
        catalog.publish(redis, new)
        assert stack._is_ready()


def failing_stack(folder: Path, ends_every_s: float) -> tuple[Stack, Signals]:
    """Return a stack whose worker ends at once, by a clock that moves at each of its ends."""
    times = iter(range(1000))
    config = StackConfig(
        folder,
        *(1, 1, WORKER_CONFIG),
        worker=(sys.executable, "-c", "raise SystemExit('no device')"),
    )
    signals = Signals()
    stack = Stack(config, signals, clock=lambda: next(times) * ends_every_s)
    stack._prepare_folder()
    stack._start("worker")
    return stack, signals


def test_a_worker_that_ends_again_and_again_is_given_up(tmp_path: Path) -> None:
    stack, _ = failing_stack(tmp_path, ends_every_s=19)
    reports: list[str] = []

    def report(text: str) -> None:
        reports.append(text)
        assert len(reports) <= 3

    try:
        with pytest.raises(LocalError, match=r"no device.*, as the 3 started within the last 60 s"):
            stack.supervise(report)
    finally:
        stack.stop()
    assert len(reports) == 3
    assert all(report.endswith("; starting it again") for report in reports)


def test_a_worker_that_ends_now_and_then_is_always_restarted(tmp_path: Path) -> None:
    stack, signals = failing_stack(tmp_path, ends_every_s=21)
    reports: list[str] = []

    def report(text: str) -> None:
        reports.append(text)
        if len(reports) == 6:
            signals.count = 2

    try:
        with pytest.raises(Interrupted):
            stack.supervise(report)
    finally:
        stack.stop()
    assert len(reports) == 6
