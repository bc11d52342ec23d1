"""Test Dockerfiles, compose, units and Prometheus' files by the tools that they are made for."""

import json
import re
import sys
from pathlib import Path

import pytest
import yaml

from tests.deploy.manifests.manifest_files import (
    DEPLOY,
    ENV_EXAMPLE,
    ROOT,
    SYSTEMD,
    dockerfiles,
    interpolate,
)
from tests.deploy.manifests.tools.installed_tools import FOLDER, run

pytestmark = pytest.mark.deploy


@pytest.mark.parametrize("path", dockerfiles(), ids=lambda path: path.name)
def test_hadolint_has_nothing_to_say(path: Path) -> None:
    answer = run(["hadolint", "--failure-threshold", "style", path])
    assert (answer.returncode, answer.stdout, answer.stderr) == (0, "", "")


def test_hadolint_would_say_something(tmp_path: Path) -> None:
    path = tmp_path / "Dockerfile"
    path.write_text("FROM debian:latest\nRUN apt-get install curl\n")
    assert run(["hadolint", path]).returncode == 1


@pytest.mark.parametrize("name", ["compose.yaml", "compose.tls.yaml", "compose.outside.yaml"])
def test_compose_fits_its_schema(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    text = interpolate((DEPLOY / name).read_text(encoding="utf-8"), ENV_EXAMPLE)
    path.write_text(text, encoding="utf-8")
    check = ["check-jsonschema", "--builtin-schema", "vendor.compose-spec"]
    answer = run([*check, path])
    assert answer.returncode == 0, answer.stdout
    path.write_text(re.sub(r"^( +)(command|networks):", r"\1\2z:", text, count=1, flags=re.M))
    assert run([*check, path]).returncode == 1


def units(folder: Path) -> list[Path]:
    """Copy the units, with a program of this machine in place of those they start."""
    copied = []
    for path in SYSTEMD.rglob("*"):
        if (
            path.suffix in (".service", ".target", ".conf") and "wan" in path.name
        ) or path.parent != SYSTEMD:
            text = path.read_text(encoding="utf-8")
            text = text.replace("/opt/wan/.venv/bin/python", sys.executable)
            text = re.sub("/usr/bin/(valkey|redis)-server", sys.executable, text)
            target = folder / path.relative_to(SYSTEMD)
            target.parent.mkdir(exist_ok=True)
            target.write_text(text, encoding="utf-8")
            if path.suffix in (".service", ".target"):
                copied.append(target)
    return copied


def verify(folder: Path, paths: list[Path]) -> str:
    """Let systemd read units; return what it says of them. It ends with 0 on unknown settings."""
    instances = [str(path).replace("@.service", "@0.service") for path in paths]
    answer = run(["systemd-analyze", "verify", "--man=no", *instances])
    names = "|".join(re.escape(Path(each).name) for each in (*instances, *map(str, paths)))
    return "\n".join(line for line in answer.stderr.splitlines() if re.search(names, line))


def test_systemd_has_nothing_to_say_of_the_units(tmp_path: Path) -> None:
    paths = units(tmp_path)
    assert len(paths) == 4
    assert verify(tmp_path, paths) == ""


def test_systemd_would_say_something(tmp_path: Path) -> None:
    paths = units(tmp_path)
    (worker,) = (path for path in paths if "worker" in path.name)
    worker.write_text(worker.read_text().replace("WatchdogSec=", "WatchdogSecs="))
    assert "WatchdogSecs" in verify(tmp_path, paths)


@pytest.mark.parametrize("name", ["wan-service@", "wan-worker@", "wan-valkey"])
def test_units_are_exposed_to_little(name: str, tmp_path: Path) -> None:
    units(tmp_path)
    path = tmp_path / f"{name}.service"
    answer = run(["systemd-analyze", "security", "--offline=true", "--no-pager", path])
    found = re.search(r"Overall exposure level for \S+: ([\d.]+)", answer.stdout)
    assert found, answer.stderr
    # A worker opens the devices of its card, and compiles kernels.
    assert float(found[1]) <= (2.2 if "worker" in name else 1.8), answer.stdout


@pytest.mark.parametrize("name", ["prometheus.yml", "kubernetes.yml"])
def test_prometheus_takes_its_configuration(name: str, tmp_path: Path) -> None:
    for path in (DEPLOY / "prometheus").glob("*.yml"):
        (tmp_path / path.name).write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "key").write_text("wan_0")
    config = yaml.safe_load((tmp_path / name).read_text(encoding="utf-8"))
    (scraped,) = config["scrape_configs"]
    scraped["authorization"]["credentials_file"] = str(tmp_path / "key")
    if name == "kubernetes.yml":
        # Debian's build knows no Kubernetes. What it finds there is checked here.
        (found,) = scraped.pop("kubernetes_sd_configs")
        assert found == {"role": "pod", "namespaces": {"names": ["wan"]}}
    (tmp_path / name).write_text(yaml.safe_dump(config), encoding="utf-8")
    answer = run(["promtool", "check", "config", tmp_path / name])
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert re.search(r"\b1[0-9] rules found", answer.stdout), answer.stdout


def test_each_alert_fires_when_it_should() -> None:
    answer = run(["promtool", "test", "rules", DEPLOY / "prometheus" / "alerts_test.yml"])
    assert answer.returncode == 0, answer.stdout + answer.stderr


def test_a_wrong_alert_is_noticed(tmp_path: Path) -> None:
    for name in ("alerts.yml", "alerts_test.yml"):
        text = (DEPLOY / "prometheus" / name).read_text(encoding="utf-8")
        (tmp_path / name).write_text(text.replace("_age_seconds) > 3600", "_age_seconds) > 9000"))
    assert run(["promtool", "test", "rules", tmp_path / "alerts_test.yml"]).returncode == 1


def test_bills_of_materials_name_what_is_installed(tmp_path: Path) -> None:
    """`make sbom` reads the same files that images are made of."""
    for name in ("service", "worker-without-torch", "tracing"):
        path = ROOT / "requirements" / f"{name}.txt"
        made = tmp_path / f"{name}.json"
        answer = run(["cyclonedx-py", "requirements", path, "-o", made])
        assert answer.returncode == 0, answer.stderr
        components = json.loads(made.read_text())["components"]
        named = {(each["name"].lower(), each["version"]) for each in components}
        pinned = re.findall(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)", path.read_text(), re.M)
        assert named == {(name.lower(), version) for name, version in pinned}


def test_the_tools_are_those_of_the_environment() -> None:
    for name in ("hadolint", "check-jsonschema", "kubernetes-validate", "kubectl"):
        assert (FOLDER / "bin" / name).exists()
