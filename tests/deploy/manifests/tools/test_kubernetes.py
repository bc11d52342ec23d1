"""Test what kustomize makes of each overlay: valid, locked in, and replaced without a gap."""

import json
import re
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.manifests.manifest_files import K8S, OVERLAYS, ROOT, VERSION, pod_spec
from tests.deploy.manifests.tools.installed_tools import run

pytestmark = pytest.mark.deploy

KUBERNETES = "1.33"
KEDA_SCHEMA = Path(__file__).with_name("keda-scaledobject.schema.json")
CARD = {
    "cpu": None,
    "cuda": "nvidia.com/gpu",
    "ascend910b": "huawei.com/Ascend910",
    "ascend910b-cce": "huawei.com/ascend-1980",
}


@cache
def built(overlay: str) -> list[dict[str, Any]]:
    """Build an overlay; with `+NAME` the component of that name is added to it."""
    name, _, component = overlay.partition("+")
    if component:
        return built_with(name, component)
    answer = run(["kubectl", "kustomize", K8S / "overlays" / name])
    assert answer.returncode == 0, answer.stderr
    assert not answer.stderr, answer.stderr
    return list(yaml.safe_load_all(answer.stdout))


def built_with(overlay: str, component: str) -> list[dict[str, Any]]:
    folder = K8S / f".with-{component}"
    folder.mkdir()
    try:
        text = {
            "resources": [f"../overlays/{overlay}"],
            "components": [f"../components/{component}"],
        }
        (folder / "kustomization.yaml").write_text(yaml.safe_dump(text))
        answer = run(["kubectl", "kustomize", folder])
    finally:
        (folder / "kustomization.yaml").unlink()
        folder.rmdir()
    assert answer.returncode == 0, answer.stderr
    return list(yaml.safe_load_all(answer.stdout))


COMPONENTS = sorted(path.name for path in (K8S / "components").iterdir())
ALL = [*OVERLAYS, *(f"cuda+{name}" for name in COMPONENTS)]


def one(overlay: str, kind: str, name: str) -> dict[str, Any]:
    (found,) = (
        each for each in built(overlay) if each["kind"] == kind and each["metadata"]["name"] == name
    )
    return found


def pods(overlay: str) -> list[tuple[str, dict[str, Any]]]:
    return [(each["metadata"]["name"], spec) for each in built(overlay) if (spec := pod_spec(each))]


def test_there_is_an_overlay_for_each_device() -> None:
    assert set(OVERLAYS) == set(CARD)


def test_everything_is_valid(tmp_path: Path) -> None:
    """What several overlays have alike is checked once: the tool takes its time."""
    every = {json.dumps(each, sort_keys=True): each for name in ALL for each in built(name)}
    scaled = [each for each in every.values() if each["apiVersion"].startswith("keda.sh")]
    ours = [each for each in every.values() if each not in scaled]
    assert len(ours) > 20
    assert len(scaled) == 3, "as many workers as the miniature gets, as cards, and two at least"
    manifest = tmp_path / "all.yaml"
    manifest.write_text(yaml.safe_dump_all(ours))
    check = ["kubernetes-validate", "--strict", "-k", KUBERNETES]
    answer = run([*check, manifest, K8S / "first-key.yaml", K8S / "fill-models.yaml"])
    assert answer.returncode == 0, answer.stdout + answer.stderr
    for number, each in enumerate(scaled):
        (tmp_path / f"keda-{number}.json").write_text(json.dumps(each))
    answer = run(["check-jsonschema", "--schemafile", KEDA_SCHEMA, *tmp_path.glob("keda-*.json")])
    assert answer.returncode == 0, answer.stdout + answer.stderr


@pytest.mark.parametrize(
    "wrong", ["spec: {replicaz: 1}", "spec: {template: {spec: {containers: 3}}}"]
)
def test_the_check_refuses_what_is_wrong(wrong: str, tmp_path: Path) -> None:
    manifest = tmp_path / "wrong.yaml"
    manifest.write_text(f"apiVersion: apps/v1\nkind: Deployment\nmetadata: {{name: a}}\n{wrong}\n")
    assert run(["kubernetes-validate", "--strict", "-k", KUBERNETES, manifest]).returncode != 0


def test_the_check_of_keda_refuses_an_unknown_field(tmp_path: Path) -> None:
    scaled = json.loads(json.dumps(one("cuda", "ScaledObject", "wan-worker")))
    scaled["spec"]["minReplicas"] = 1
    (tmp_path / "keda.json").write_text(json.dumps(scaled))
    answer = run(["check-jsonschema", "--schemafile", KEDA_SCHEMA, tmp_path / "keda.json"])
    assert answer.returncode == 1
    assert "minReplicas" in answer.stdout


@pytest.mark.parametrize("overlay", ALL)
def test_every_container_is_locked_in(overlay: str) -> None:
    for name, spec in pods(overlay):
        assert spec["automountServiceAccountToken"] is False, name
        user = spec["securityContext"]
        assert user["runAsNonRoot"] is True
        assert user["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in [*spec.get("initContainers", ()), *spec["containers"]]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }, container["name"]
            assert container["resources"]["limits"]["memory"]
            assert ":" in container["image"].rpartition("/")[2], "an image without a tag is any"


@pytest.mark.parametrize("overlay", ALL)
def test_what_is_mounted_is_there_and_weights_are_read_only(overlay: str) -> None:
    claims = {
        each["metadata"]["name"]
        for each in built(overlay)
        if each["kind"] == "PersistentVolumeClaim"
    }
    for name, spec in pods(overlay):
        volumes = {each["name"]: each for each in spec["volumes"]}
        own = {"data"} if name == "valkey" else set()
        for container in [*spec.get("initContainers", ()), *spec["containers"]]:
            mounts = {each["name"]: each for each in container["volumeMounts"]}
            assert set(mounts) <= set(volumes) | own
            assert mounts.get("models", {}).get("readOnly", True) is True
        used = {
            v["persistentVolumeClaim"]["claimName"]
            for v in volumes.values()
            if "persistentVolumeClaim" in v
        }
        assert used <= claims
    assert ("wan-artifacts" in claims) == (not overlay.endswith("bucket"))


@pytest.mark.parametrize("overlay", ALL)
def test_secrets_are_named_and_never_written(overlay: str) -> None:
    assert not [each for each in built(overlay) if each["kind"] == "Secret"]
    for _, spec in pods(overlay):
        for container in spec["containers"]:
            for each in container.get("env", ()):
                if (
                    each["name"] in ("REDIS_URL", "SERVICE_URL_SECRET", "VALKEY_PASSWORD")
                    or "AWS_" in each["name"]
                ):
                    assert each["valueFrom"]["secretKeyRef"]["name"] == "wan-secrets"


@pytest.mark.parametrize("overlay", ALL)
def test_a_worker_is_ready_when_it_says_so_and_may_finish_its_job(overlay: str) -> None:
    spec = one(overlay, "Deployment", "wan-worker")["spec"]
    pod = spec["template"]["spec"]
    (worker,) = pod["containers"]
    assert worker["readinessProbe"]["exec"]["command"][-1] == "--ready"
    assert "livenessProbe" not in worker, "it would end a worker that loads or takes a long step"
    assert "replicas" not in spec, "the autoscaler has that number"
    assert pod["terminationGracePeriodSeconds"] >= (120 if overlay == "cpu" else 7200)
    environment = {each["name"]: each.get("value") for each in worker["env"]}
    assert environment["WORKER_DRAIN"] == "finish"
    (check,) = pod["initContainers"]
    assert check["args"][-1] == "--files"
    checked = {each["name"]: each["value"] for each in check["env"]}
    assert checked["WORKER_CONFIG"] == environment["WORKER_CONFIG"]
    assert set(checked) <= {"WORKER_CONFIG", "NVIDIA_VISIBLE_DEVICES"}


@pytest.mark.parametrize("overlay", ALL)
def test_a_rollout_drops_no_mode(overlay: str) -> None:
    rolling = one(overlay, "Deployment", "wan-worker")["spec"]["strategy"]["rollingUpdate"]
    scaled = one(overlay, "ScaledObject", "wan-worker")["spec"]
    assert scaled["scaleTargetRef"] == {"name": "wan-worker"}
    if rolling["maxUnavailable"]:
        assert rolling == {"maxUnavailable": 1, "maxSurge": 0}
        assert scaled["minReplicaCount"] >= 2
    else:
        assert rolling == {"maxUnavailable": 0, "maxSurge": 1}
        assert scaled["minReplicaCount"] >= 1
    down = scaled["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]["scaleDown"]
    assert down["stabilizationWindowSeconds"] >= 600
    assert down["policies"] == [{"type": "Pods", "value": 1, "periodSeconds": 300}]


@pytest.mark.parametrize("overlay", ALL)
def test_the_front_end_is_asked_whether_it_is_alive_and_not_for_workers(overlay: str) -> None:
    (container,) = one(overlay, "Deployment", "wan-service")["spec"]["template"]["spec"][
        "containers"
    ]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"] == {"path": "/healthz", "port": "http"}


@pytest.mark.parametrize("overlay", ALL)
def test_what_selects_pods_finds_them(overlay: str) -> None:
    labels = [
        each["spec"]["template"]["metadata"]["labels"] for each in built(overlay) if pod_spec(each)
    ]

    def finds(selector: dict[str, str]) -> bool:
        return any(selector.items() <= each.items() for each in labels)

    for each in built(overlay):
        spec, kind = each.get("spec", {}), each["kind"]
        if kind == "Service":
            assert finds(spec["selector"])
        elif kind in ("Deployment", "StatefulSet", "PodDisruptionBudget"):
            assert finds(spec["selector"]["matchLabels"])
        elif kind == "NetworkPolicy":
            peers = [p for rule in spec.get("ingress", []) for p in rule.get("from", ())]
            peers += [p for rule in spec.get("egress", []) for p in rule.get("to", ())]
            chosen = [p["podSelector"] for p in peers if {"podSelector"} == set(p)]
            for selector in (spec["podSelector"], *chosen):
                assert finds(selector.get("matchLabels", {})), each["metadata"]["name"]
    budgets = [each for each in built(overlay) if each["kind"] == "PodDisruptionBudget"]
    assert len(budgets) == len(labels) == (2 if overlay.endswith("outside-valkey") else 3)


@pytest.mark.parametrize("overlay", ALL)
def test_nobody_is_reached_who_need_not_be(overlay: str) -> None:
    policies = {
        e["metadata"]["name"]: e["spec"] for e in built(overlay) if e["kind"] == "NetworkPolicy"
    }
    assert policies["nothing"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    reached = {
        name: [port["port"] for rule in spec["ingress"] for port in rule["ports"]]
        for name, spec in policies.items()
        if "ingress" in spec
    }
    valkey = {} if overlay.endswith("outside-valkey") else {"valkey-serves-its-clients": ["redis"]}
    assert reached == valkey | {"service-is-reached-by-ingress-and-prometheus": ["http"]}
    assert all(rule["from"] for spec in policies.values() for rule in spec.get("ingress", ()))


def test_the_miniature_needs_no_volume_for_many_nodes() -> None:
    for name in ("wan-models", "wan-artifacts"):
        assert one("cpu", "PersistentVolumeClaim", name)["spec"]["accessModes"] == ["ReadWriteOnce"]
        assert one("cuda", "PersistentVolumeClaim", name)["spec"]["accessModes"] == [
            "ReadWriteMany"
        ]


def test_a_valkey_elsewhere_takes_the_place_of_this_one() -> None:
    left = [each for each in built("cuda+outside-valkey") if "valkey" in each["metadata"]["name"]]
    (policy,) = left
    assert policy["kind"] == "NetworkPolicy"
    assert policy["spec"]["egress"] == [{"ports": [{"port": 6379}, {"port": 6380}]}]


def test_traces_are_asked_for_and_let_out() -> None:
    settings = one("cuda+traces", "ConfigMap", "wan-settings")["data"]
    port = int(settings["OTEL_EXPORTER_OTLP_ENDPOINT"].rpartition(":")[2])
    policy = one("cuda+traces", "NetworkPolicy", "service-and-workers-send-traces")["spec"]
    (rule,) = policy["egress"]
    assert rule["ports"] == [{"port": port}]
    for name in ("wan-service", "wan-worker"):
        template = one("cuda+traces", "Deployment", name)["spec"]["template"]
        assert (
            policy["podSelector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
        )
        (container,) = template["spec"]["containers"]
        assert {"configMapRef": {"name": "wan-settings"}} in container["envFrom"]


def test_the_documented_patch_lets_another_port_of_a_bucket_out(tmp_path: Path) -> None:
    text = (K8S / "components" / "bucket" / "egress.yaml").read_text(encoding="utf-8")
    patch = "\n".join(re.findall(r"^# {3}(.*)$", text, re.M))
    folder = tmp_path / "deploy"
    for name in ("k8s", "valkey"):
        shutil.copytree(K8S.parent / name, folder / name)
    (folder / "k8s" / "mine").mkdir()
    (folder / "k8s" / "mine" / "kustomization.yaml").write_text(
        f"resources: [../overlays/cuda]\ncomponents: [../components/bucket]\npatches:\n{patch}\n",
        encoding="utf-8",
    )
    answer = run(["kubectl", "kustomize", folder / "k8s" / "mine"])
    assert answer.returncode == 0, answer.stderr
    ports = [
        each["spec"]["egress"][0]["ports"]
        for each in yaml.safe_load_all(answer.stdout)
        if each["metadata"]["name"] == "service-and-workers-use-the-bucket"
    ]
    assert ports == [[{"port": 9000}]]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_each_worker_has_one_card(overlay: str) -> None:
    pod = one(overlay, "Deployment", "wan-worker")["spec"]["template"]["spec"]
    (worker,) = pod["containers"]
    cards = {name: n for name, n in worker["resources"]["limits"].items() if "/" in name}
    assert cards == ({} if CARD[overlay] is None else {CARD[overlay]: 1})
    # The check of the files takes none.
    assert not [name for name in pod["initContainers"][0]["resources"]["limits"] if "/" in name]
    environment = {each["name"]: each for each in worker["env"]}
    if overlay == "ascend910b":
        assert pod["schedulerName"] == "volcano"
        field = environment["ASCEND_VISIBLE_DEVICES"]["valueFrom"]["fieldRef"]["fieldPath"]
        assert field == f"metadata.annotations['{CARD[overlay]}']"
    else:
        assert "ASCEND_VISIBLE_DEVICES" not in environment
    hosts = [each["name"] for each in pod["volumes"] if "hostPath" in each]
    namespace = one(overlay, "Namespace", "wan")["metadata"]["labels"]
    enforced = namespace["pod-security.kubernetes.io/enforce"]
    assert enforced == ("privileged" if hosts else "restricted")
    assert bool(hosts) == (overlay == "ascend910b-cce")


def test_the_documented_overlay_is_built_as_it_says(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```yaml\n(.*?)^```$", text, re.M | re.S)
    (tmp_path / "wan-hif8" / "deploy").mkdir(parents=True)
    for name in ("k8s", "valkey"):
        shutil.copytree(K8S.parent / name, tmp_path / "wan-hif8" / "deploy" / name)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "kustomization.yaml").write_text(block, encoding="utf-8")
    answer = run(["kubectl", "kustomize", tmp_path / "mine"])
    assert answer.returncode == 0, answer.stderr
    assert "videos.example.com" not in answer.stdout
    assert answer.stdout.count("films.example.org") == 3
    assert f"image: registry.example.com/wan-worker:{VERSION}-cuda" in answer.stdout
    assert "ARTIFACTS_URL: s3://films/wan?endpoint=https://s3.example.org" in answer.stdout
    assert "wan-artifacts" not in answer.stdout
