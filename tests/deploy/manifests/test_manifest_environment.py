"""Test that manifests set only variables that a process reads, to values that it takes."""

import re
from typing import Any

import certifi
import pytest

from service.settings import ServiceSettings
from tests.deploy.manifests.manifest_files import (
    DEPLOY,
    ENV_EXAMPLE,
    ROOT,
    Process,
    compose,
    compose_with_tls,
    processes,
)
from worker.settings import WorkerSettings

SETTINGS: dict[str, type[Any]] = {"service": ServiceSettings, "worker": WorkerSettings}
PROCESSES = list(processes())
SECRET_AUTHORITY = "/run/secrets/valkey-authority"

# Read by what service and worker are made of, not by their settings (docs/deployment.md).
OTHERS = {
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "FORWARDED_ALLOW_IPS",
    "CUDA_VISIBLE_DEVICES",
    "NVIDIA_VISIBLE_DEVICES",
    "NVIDIA_DRIVER_CAPABILITIES",
    "TRITON_CACHE_DIR",
    "ASCEND_VISIBLE_DEVICES",
    "ASCEND_RT_VISIBLE_DEVICES",
    "ASCEND_CACHE_PATH",
    "ASCEND_PROCESS_LOG_PATH",
    "PATH",
    "HOME",
    "PYTHONUNBUFFERED",
    "PYTHONDONTWRITEBYTECODE",
}


def read_by(kind: str) -> set[str]:
    return {str(each.validation_alias) for each in SETTINGS[kind].model_fields.values()}


def test_every_way_to_start_a_process_is_looked_at() -> None:
    found = {process.where for process in PROCESSES}
    assert {"docker/service", "docker/worker.npu", "compose service-2", "k8s ascend910b"} <= found
    assert {"compose worker-ascend-0", "k8s service", "systemd wan-worker@.service"} <= found
    assert len(found) == len(PROCESSES) >= 18


@pytest.mark.parametrize("process", PROCESSES, ids=lambda process: process.where)
def test_every_variable_is_read_by_the_process_that_gets_it(process: Process) -> None:
    is_shared = process.where.startswith("systemd")  # service and worker have one file
    known = read_by("service") | read_by("worker") if is_shared else read_by(process.kind)
    unread = set(process.environment) - known - OTHERS
    assert not unread, f"{process.where} sets {unread}, which its {process.kind} does not read"


@pytest.mark.parametrize("process", PROCESSES, ids=lambda process: process.where)
def test_every_value_is_taken(process: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in read_by(process.kind):
        monkeypatch.delenv(name, raising=False)
    # An image or an overlay does not say where the videos are.
    monkeypatch.setenv("ARTIFACTS_URL", "file:///artifacts")
    for name, value in process.environment.items():
        # Certificates are read at once; the secret's place is in the container only.
        monkeypatch.setenv(name, value.replace(SECRET_AUTHORITY, certifi.where()))
    settings = SETTINGS[process.kind]()
    if process.where.startswith("compose.tls"):
        assert settings.redis_url.get_secret_value().startswith("rediss://")
        return  # the rest is said in compose.yaml
    if process.kind == "service" and not process.where.startswith("systemd"):
        assert not settings.is_local, "nobody reaches a container's loopback"
    if process.kind == "service":
        assert not settings.may_be_open, "without a key everybody could do everything"


def test_what_is_read_by_others_is_explained() -> None:
    text = (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")
    plain = {"PATH", "HOME", "PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE"}
    unexplained = {name for name in OTHERS - plain if f"`{name}`" not in text}
    assert not unexplained


def test_every_client_of_valkey_speaks_tls_if_it_does() -> None:
    plain, encrypted = compose()["services"], compose_with_tls()["services"]
    clients = {name for name, each in plain.items() if "REDIS_URL" in each.get("environment", {})}
    assert set(encrypted) == clients | {"valkey"}
    assert all(each["secrets"] for each in encrypted.values())


def test_the_example_has_every_variable_that_compose_asks_for() -> None:
    asked = set(re.findall(r"\$\{(\w+)", (DEPLOY / "compose.yaml").read_text(encoding="utf-8")))
    example = (DEPLOY / ".env.example").read_text(encoding="utf-8")
    named = set(re.findall(r"^#?([A-Z_]+)=", example, re.M))
    # Versions and what only one card's worker needs have defaults that need no thought.
    silent = {name for name in asked if name.endswith("_VERSION")}
    silent |= {"ASCEND_GROUP", "WORKER_CONFIG", "WORKER_THREADS"}
    assert asked - silent == named
    assert set(ENV_EXAMPLE) <= named


def test_no_secret_is_written_down() -> None:
    for path in DEPLOY.rglob("*"):
        if path.suffix in (".yaml", ".yml", ".service", ".conf", ".example"):
            for line in path.read_text(encoding="utf-8").splitlines():
                found = re.search(r"(?i)(password|secret|access_key|secret_key)(: |=)(\S+)", line)
                if found and not line.lstrip().startswith("#"):
                    # A variable, a reference, or where the caller puts one in.
                    assert re.match(r"\$|\{|\[|\./", found[3]), f"{path.name}: {line}"
