"""Test that images, compose, Kubernetes and systemd agree: names, users, ports, paths, commands."""

import re
import shutil
import subprocess
from fnmatch import fnmatch
from pathlib import Path

import pytest
import typer.main
import yaml
from fastapi.testclient import TestClient

from service.cli import app as service_app
from tests.deploy.manifests.manifest_files import (
    DEPLOY,
    DOCKER,
    K8S,
    OVERLAYS,
    ROOT,
    SYSTEMD,
    VERSION,
    base_objects,
    compose,
    docker_environment,
    dockerfiles,
    pod_spec,
    unit_values,
)
from worker.doctor.command import doctor

UID = 10001


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8").replace("\\\n", " ")


def copied(path: Path) -> list[str]:
    """The files and folders of the project that an image takes."""
    lines = re.findall(r"^COPY (?!--from)(.*)$", text_of(path), re.M)
    return [source.rstrip("/") for line in lines for source in line.split()[:-1]]


def is_sent(name: str) -> bool:
    """Whether .dockerignore lets a builder have it: the last line that fits decides."""
    sent = True
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        pattern = line.removeprefix("!").removeprefix("**/")
        parts = [name, *map(str, Path(name).parents), Path(name).name]
        if line and not line.startswith("#") and any(fnmatch(part, pattern) for part in parts):
            sent = line.startswith("!")
    return sent


def test_there_is_an_image_for_each_device() -> None:
    names = [path.name.removesuffix(".Dockerfile") for path in dockerfiles()]
    assert names == ["service", "worker.cpu", "worker.cuda", "worker.npu"]


@pytest.mark.parametrize("path", dockerfiles(), ids=lambda path: path.name)
def test_what_an_image_takes_is_there_and_is_sent(path: Path) -> None:
    sources = copied(path)
    assert {"pyproject.toml", "jobs"} <= set(sources)
    for source in sources:
        assert (ROOT / source).exists(), source
        assert is_sent(source) or all(is_sent(f"{source}/{each}") for each in ("a.txt",)), source


def test_weights_keys_and_history_are_never_sent() -> None:
    for name in ("models/wan-mini/x", ".git/config", "deploy/.env", "deploy/wan.env", "var/x"):
        assert not is_sent(name), name
    for name in ("deploy/metrics-key", "deploy/certificates/valkey.key"):
        assert not is_sent(name), name
    assert is_sent("service/app.py")
    assert not is_sent("service/__pycache__/app.pyc")


def test_the_front_end_takes_nothing_of_the_worker() -> None:
    sources = copied(DOCKER / "service.Dockerfile")
    assert not {"worker", "quant", "mini", "requirements/worker.txt"} & set(sources)


@pytest.mark.parametrize("path", dockerfiles(), ids=lambda path: path.name)
def test_an_image_runs_as_a_user_with_a_health_check(path: Path) -> None:
    text = text_of(path)
    assert re.findall(r"^USER (.*)$", text, re.M)[-1] == f"{UID}:{UID}"
    assert f"useradd --uid {UID} " in text
    assert re.search(r"^HEALTHCHECK .*CMD \[", text, re.M)
    assert re.search(r"pip install [^&]*--require-hashes", text)
    assert docker_environment(path)["HOME"] == "/tmp", "the only folder that can be written"


@pytest.mark.parametrize("path", dockerfiles(), ids=lambda path: path.name)
def test_an_image_can_send_traces(path: Path) -> None:
    """Without these packages a process that is asked for traces does not start."""
    assert "requirements/tracing.txt" in copied(path)
    assert re.search(r"pip install [^&]*-r /src/requirements/tracing\.txt", text_of(path))


@pytest.mark.parametrize("path", dockerfiles(), ids=lambda path: path.name)
def test_an_image_has_the_configuration_that_it_names(path: Path) -> None:
    config = docker_environment(path).get("WORKER_CONFIG")
    if path.name.startswith("worker"):
        assert config
        assert config.removeprefix("/app/") in copied(path)


def test_every_manifest_runs_the_images_of_this_version() -> None:
    built = set(re.findall(r"name=(wan-\w+):", (DOCKER / "build.sh").read_text()))
    assert built == {"wan-service", "wan-worker"}
    for name, service in compose()["services"].items():
        if service["image"].startswith("wan-"):
            assert re.fullmatch(rf"wan-\w+:{re.escape(VERSION)}(-\w+)?", service["image"]), name
    for folder in ("base", *(f"overlays/{each}" for each in OVERLAYS)):
        kustomization = yaml.safe_load((K8S / folder / "kustomization.yaml").read_text())
        for image in kustomization["images"]:
            if image["name"].startswith("wan-"):
                assert image["name"] in built
                assert image["newTag"].partition("-")[0] == VERSION
    for name in ("first-key.yaml", "fill-models.yaml"):
        assert f"image: wan-service:{VERSION}\n" in (K8S / name).read_text()


def test_every_container_of_ours_has_the_image_s_user() -> None:
    for name, service in compose()["services"].items():
        if service["image"].startswith("wan-"):
            assert service["user"] == f"{UID}:{UID}", name
            assert service["read_only"] is True
            assert any(each.startswith(f"/tmp:uid={UID},") for each in service["tmpfs"])
    for document in base_objects():
        spec = pod_spec(document)
        if spec and spec["containers"][0]["image"].startswith("wan-"):
            assert spec["securityContext"]["runAsUser"] == UID


def test_the_port_is_one_number() -> None:
    port = docker_environment(DOCKER / "service.Dockerfile")["SERVICE_PORT"]
    assert f"EXPOSE {port}\n" in (DOCKER / "service.Dockerfile").read_text()
    services = compose()["services"]
    upstreams = services["proxy"]["environment"]["UPSTREAMS"].split()
    replicas = [f"{name}:{port}" for name in services if name.startswith("service-")]
    assert upstreams == replicas
    scraped = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    assert scraped["scrape_configs"][0]["static_configs"][0]["targets"] == replicas
    (deployment,) = (
        each
        for each in base_objects()
        if each["kind"] == "Deployment" and each["metadata"]["name"] == "wan-service"
    )
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    assert container["ports"] == [{"name": "http", "containerPort": int(port)}]


def test_probes_ask_what_answers(client: TestClient) -> None:
    asking = (
        K8S / "base" / "service.yaml",
        DEPLOY / "proxy" / "Caddyfile",
        DOCKER / "service.Dockerfile",
    )
    text = "".join(path.read_text(encoding="utf-8") for path in asking)
    asked = re.findall(r"(?:path: |health_uri |\})(/\w+)", text)
    assert len([each for each in asked if each == "/healthz"]) == 5
    assert client.get("/healthz").status_code == 200
    assert "/readyz" not in {each for each in asked if each != "/tmp"}


def test_the_commands_in_manifests_exist() -> None:
    alone = typer.Typer()
    alone.command()(doctor)
    options = {option for each in typer.main.get_command(alone).params for option in each.opts}
    text = "".join(
        path.read_text(encoding="utf-8")
        for folder in (DOCKER, K8S)
        for path in folder.rglob("*")
        if path.is_file()
    )
    used = set(re.findall(r'doctor"?, "?(--\w+)', text))
    assert used == {"--ready", "--files"}
    assert used <= options
    keys = typer.main.get_command(service_app).commands["keys"].commands["add"]  # type: ignore[attr-defined]
    assert "--role" in {option for each in keys.params for option in each.opts}


def test_units_start_what_is_there() -> None:
    for path in SYSTEMD.rglob("*.service"):
        for command in unit_values(path, "ExecStart"):
            module = re.search(r"python -m (\w+)", command)
            assert module is None or (ROOT / module[1] / "__main__.py").exists()
    ascend = SYSTEMD / "wan-worker@.service.d" / "ascend.conf"
    script = unit_values(ascend, "ExecStart")[-1].split()[1]
    assert (ROOT / script.removeprefix("/opt/wan/")).exists()


def test_an_unknown_image_is_refused_before_anything_is_built(tmp_path: Path) -> None:
    docker = tmp_path / "docker"
    docker.write_text("#!/bin/sh\necho built >&2\n")
    docker.chmod(0o755)
    sh = shutil.which("sh")
    assert sh
    answer = subprocess.run(
        [sh, DOCKER / "build.sh", "gpu"],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 1
    assert answer.stderr == "error: there is no image gpu: take service, cpu, cuda or npu\n"


def test_with_cann_says_what_is_missing_and_passes_on_what_is_there(tmp_path: Path) -> None:
    script = DOCKER / "with-cann.sh"
    sh = shutil.which("sh")
    assert sh
    if not Path("/usr/local/Ascend").exists():
        answer = subprocess.run([sh, script, "true"], capture_output=True, text=True, check=False)
        assert answer.returncode == 1
        assert "set CANN_ENV" in answer.stderr
    (tmp_path / "set_env.sh").write_text('export FROM_CANN="$NOT_SET yes"\n')
    environment = {"PATH": "/usr/bin:/bin", "CANN_ENV": str(tmp_path / "set_env.sh")}
    answer = subprocess.run(
        [sh, script, sh, "-c", 'echo "$FROM_CANN|$1|$2"', "x", "a b", "$c"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert answer.stdout == " yes|a b|$c\n"
