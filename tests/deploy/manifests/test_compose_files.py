"""Test what Compose's files let service, workers and Grafana reach, be told and start."""

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.manifests.manifest_files import (
    DEPLOY,
    ENV_EXAMPLE,
    ROOT,
    compose,
    compose_override,
)


def processes(values: Mapping[str, str] = ENV_EXAMPLE) -> dict[str, dict[str, Any]]:
    """Return services and workers by name, as compose.yaml has them."""
    services = compose(values)["services"]
    return {name: each for name, each in services.items() if each["image"].startswith("wan-")}


def test_nothing_of_ours_reaches_outside_unless_asked_for() -> None:
    networks = compose()["networks"]
    assert [name for name, each in networks.items() if not each.get("internal")] == ["outside"]
    assert not [name for name, each in processes().items() if "outside" in each["networks"]]


def test_the_way_out_is_there_for_every_process_of_ours() -> None:
    """Compose adds an override's list to the one that is there."""
    added = compose_override("outside")["services"]
    assert added == {name: {"networks": ["outside"]} for name in processes()}


def test_every_process_of_ours_takes_further_variables() -> None:
    for name, each in processes().items():
        assert each["env_file"] == [{"path": "./wan.env", "required": False}], name
    assert "deploy/wan.env\n" in (ROOT / ".gitignore").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "name",
    ["WORKER_DRAIN", "REDIS_WAIT_REPLICAS", "SERVICE_WEBHOOK_HOSTS", "OTEL_EXPORTER_OTLP_ENDPOINT"],
)
def test_what_is_documented_for_that_file_is_not_overruled(name: str) -> None:
    """What a process has under `environment` goes before its files, even if it is empty."""
    assert f"`{name}`" in (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")
    assert not [each for each, made in processes().items() if name in made["environment"]]


def test_a_valkey_elsewhere_is_one_variable() -> None:
    values = ENV_EXAMPLE | {"VALKEY_ADDRESS": "valkey.example.com:6380"}
    for name, each in processes(values).items():
        assert "@valkey.example.com:6380/0" in each["environment"]["REDIS_URL"], name
    for name, each in compose_override("tls", values)["services"].items():
        if name != "valkey":
            assert "@valkey.example.com:6380/0?" in each["environment"]["REDIS_URL"], name


@pytest.mark.parametrize("password", ["", "a $b"])
def test_grafana_starts_only_with_a_password(password: str, tmp_path: Path) -> None:
    program, *words, script = compose()["services"]["grafana"]["entrypoint"]
    (tmp_path / "run.sh").write_text("#!/bin/sh\necho started\n")
    (tmp_path / "run.sh").chmod(0o755)
    assert "exec /run.sh" in script
    found = shutil.which(program)
    assert found
    answer = subprocess.run(
        [found, *words, script.replace("/run.sh", str(tmp_path / "run.sh"))],
        env={"PATH": os.environ["PATH"], "GF_SECURITY_ADMIN_PASSWORD": password},
        capture_output=True,
        text=True,
        check=False,
    )
    if password:
        assert (answer.returncode, answer.stdout) == (0, "started\n")
    else:
        assert answer.returncode == 1
        assert answer.stderr == "GRAFANA_PASSWORD is missing, see .env.example\n"


def test_the_documented_files_are_there() -> None:
    text = (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")
    overrides = {path.name for path in DEPLOY.glob("compose.*.yaml")}
    assert overrides == {"compose.tls.yaml", "compose.outside.yaml"}
    assert all(f"`-f deploy/{name}`" in text for name in overrides)
