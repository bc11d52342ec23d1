"""Read compose.yaml, Kubernetes, systemd and Dockerfiles, with the environment of each process."""

import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[3]
DEPLOY = ROOT / "deploy"
COMPOSE = DEPLOY / "compose.yaml"
K8S = DEPLOY / "k8s"
SYSTEMD = DEPLOY / "systemd"
DOCKER = ROOT / "docker"
OVERLAYS = sorted(path.name for path in (K8S / "overlays").iterdir())
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]

ENV_EXAMPLE = {
    "WAN_SITE": "https://videos.example.com",
    "VALKEY_PASSWORD": "0123456789abcdef",
}
"""What a person fills in; everything else has a default."""


@dataclass(frozen=True)
class Process:
    """A service or worker as a manifest starts it.

    Attributes:
        where: the manifest and the name in it, for messages.
        kind: `service` or `worker`.
        environment: what the manifest sets, with secrets as texts.
    """

    where: str
    kind: str
    environment: Mapping[str, str]


def compose(values: Mapping[str, str] = ENV_EXAMPLE) -> dict[str, Any]:
    """Read compose.yaml as Compose does, with variables put in, by default the example's."""
    text = COMPOSE.read_text(encoding="utf-8")
    document: dict[str, Any] = yaml.safe_load(interpolate(text, values))
    return document


def compose_with_tls() -> dict[str, Any]:
    """Read what compose.tls.yaml puts over compose.yaml."""
    return compose_override("tls")


def compose_override(name: str, values: Mapping[str, str] = ENV_EXAMPLE) -> dict[str, Any]:
    """Read what compose.NAME.yaml puts over compose.yaml."""
    text = (DEPLOY / f"compose.{name}.yaml").read_text(encoding="utf-8")
    document: dict[str, Any] = yaml.safe_load(interpolate(text, values))
    return document


def interpolate(text: str, values: Mapping[str, str]) -> str:
    """Put variables in as Compose does: `${A}`, `${A:-default}`, `${A:?error}`, `$$`."""

    def put_in(found: re.Match[str]) -> str:
        name, operator, rest = found["name"], found["operator"], found["rest"]
        if found[0] == "$$":
            return "$"
        value = values.get(name) or ""
        if value or operator is None:
            return value
        assert operator == ":-", f"{name} is required: {rest}"
        return str(rest)

    pattern = r"\$\$|\$\{(?P<name>\w+)(?:(?P<operator>:[-?])(?P<rest>[^}]*))?\}"
    return re.sub(pattern, put_in, text)


def documents(path: Path) -> list[dict[str, Any]]:
    """Read all documents of a YAML file."""
    return [each for each in yaml.safe_load_all(path.read_text(encoding="utf-8")) if each]


def base_objects() -> list[dict[str, Any]]:
    """Read the objects of the base, before any overlay."""
    names = yaml.safe_load((K8S / "base" / "kustomization.yaml").read_text())["resources"]
    files = (K8S / "base" / name for name in names if name.endswith(".yaml"))
    return [each for path in files for each in documents(path)]


def pod_spec(document: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the pod that an object makes; None if it makes none."""
    spec: dict[str, Any] | None = document.get("spec", {}).get("template", {}).get("spec")
    return spec


def deployed_worker_patches(overlay: str) -> list[dict[str, Any]]:
    """Read the patches that an overlay makes to the worker's Deployment."""
    text = (K8S / "overlays" / overlay / "kustomization.yaml").read_text(encoding="utf-8")
    patches = [yaml.safe_load(each["patch"]) for each in yaml.safe_load(text)["patches"]]
    return [each for each in patches if isinstance(each, dict) and each["kind"] == "Deployment"]


def k8s_environment(container: Mapping[str, Any]) -> dict[str, str]:
    """Return a container's variables; secrets and fields are stood in for by a text that fits."""
    found = {}
    for each in container.get("env", ()):
        stand_in = "redis://valkey:6379/0" if each["name"] == "REDIS_URL" else "x" * 32
        found[each["name"]] = each.get("value", stand_in)
    for source in container.get("envFrom", ()):
        name = source["configMapRef"]["name"]
        (settings,) = (
            each
            for each in base_objects()
            if each["kind"] == "ConfigMap" and each["metadata"]["name"] == name
        )
        found |= settings["data"]
    return found


def dockerfiles() -> list[Path]:
    """List the files of all images."""
    return sorted(DOCKER.glob("*.Dockerfile"))


def docker_environment(path: Path) -> dict[str, str]:
    """Return the variables that an image sets."""
    text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = re.findall(r"^ENV (.*)$", text, re.M)
    return dict(pair.split("=", 1) for line in lines for pair in line.split())


def unit_values(path: Path, name: str) -> list[str]:
    """Return all values of a setting in a unit's file."""
    return re.findall(rf"^{name}=(.*)$", path.read_text(encoding="utf-8"), re.M)


def unit_environment(path: Path, instance: str) -> dict[str, str]:
    """Return the variables of a unit: its own, over those of the file in /etc/wan."""
    example = (SYSTEMD / "wan.env.example").read_text(encoding="utf-8")
    found = dict(re.findall(r"^(\w+)=(.*)$", example, re.M))
    for line in unit_values(path, "Environment"):
        found |= dict(pair.split("=", 1) for pair in line.replace("%i", instance).split())
    return found


def processes() -> Iterator[Process]:
    """List every service and worker that a manifest starts, with its image's variables."""
    for path in dockerfiles():
        name = path.name.removesuffix(".Dockerfile")
        yield Process(f"docker/{name}", name.partition(".")[0], docker_environment(path))
    yield from _of_compose()
    yield from _of_kubernetes()
    for unit in ("wan-service@.service", "wan-worker@.service"):
        kind = unit.partition("@")[0].removeprefix("wan-")
        yield Process(f"systemd {unit}", kind, unit_environment(SYSTEMD / unit, "8000"))
    ascend = SYSTEMD / "wan-worker@.service.d" / "ascend.conf"
    yield Process("systemd ascend.conf", "worker", unit_environment(ascend, "0"))


def _of_compose() -> Iterator[Process]:
    for name, each in compose()["services"].items():
        image = str(each["image"])
        if image.startswith("wan-"):
            kind = image.partition(":")[0].removeprefix("wan-")
            # YAML's null is an empty variable.
            set_here = {key: str(value or "") for key, value in each["environment"].items()}
            yield Process(f"compose {name}", kind, set_here)
    for name, each in compose_with_tls()["services"].items():
        if name != "valkey":
            yield Process(f"compose.tls {name}", name.partition("-")[0], each["environment"])


def _of_kubernetes() -> Iterator[Process]:
    for document in base_objects():
        for container in (pod_spec(document) or {}).get("containers", ()):
            if container["image"].startswith("wan-"):
                kind = container["image"].removeprefix("wan-")
                yield Process(f"k8s {container['name']}", kind, k8s_environment(container))
    for overlay in OVERLAYS:
        for patch in deployed_worker_patches(overlay):
            (container,) = (pod_spec(patch) or {})["containers"]
            yield Process(f"k8s {overlay}", "worker", k8s_environment(container))
