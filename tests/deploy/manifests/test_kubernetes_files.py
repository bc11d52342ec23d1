"""Test what the Kubernetes files say before kustomize: names, logs, mounts, the first day."""

import re
import shutil
import subprocess
from typing import Any

import pytest
import yaml

from tests.deploy.manifests.manifest_files import (
    K8S,
    ROOT,
    base_objects,
    deployed_worker_patches,
    documents,
    pod_spec,
)

PODS = ["first-key", "fill-models"]


def one(kind: str, name: str) -> dict[str, Any]:
    (found,) = (
        each for each in base_objects() if each["kind"] == kind and each["metadata"]["name"] == name
    )
    return found


def pod(name: str) -> dict[str, Any]:
    (found,) = documents(K8S / f"{name}.yaml")
    return found


def test_names_are_resolved_in_clusters_of_every_kind() -> None:
    """By kube-dns, by CoreDNS under its own name (CCE), and by a cache on the node."""
    (rule,) = one("NetworkPolicy", "names-are-resolved")["spec"]["egress"]
    pods, node = rule["to"]
    (labels,) = pods["podSelector"]["matchExpressions"]
    assert labels == {"key": "k8s-app", "operator": "In", "values": ["kube-dns", "coredns"]}
    assert node == {"ipBlock": {"cidr": "169.254.0.0/16"}}
    assert {(each["port"], each["protocol"]) for each in rule["ports"]} == {
        (53, "UDP"),
        (53, "TCP"),
    }


def test_no_log_of_the_ingress_has_signatures_of_links() -> None:
    annotations = one("Ingress", "wan")["metadata"]["annotations"]
    assert annotations["nginx.ingress.kubernetes.io/enable-access-log"] == "false"


def test_a_worker_needs_no_program_of_the_node() -> None:
    """Where it is differs, and a mount of what is not there keeps the pod from starting."""
    (patch,) = deployed_worker_patches("ascend910b-cce")
    spec = pod_spec(patch)
    assert spec
    mounted = {each["hostPath"]["path"] for each in spec["volumes"]}
    assert "/usr/local/Ascend/driver" in mounted
    assert not [path for path in mounted if path.endswith("npu-smi")]


def test_the_check_of_the_files_sees_no_gpu() -> None:
    (patch,) = deployed_worker_patches("cuda")
    spec = pod_spec(patch)
    assert spec
    (check,) = spec["initContainers"]
    assert {"name": "NVIDIA_VISIBLE_DEVICES", "value": "void"} in check["env"]


@pytest.mark.parametrize("name", PODS)
def test_the_pods_of_the_first_day_only_wait(name: str) -> None:
    """A key that a pod prints is in the log of the cluster."""
    spec = pod(name)["spec"]
    (container,) = spec["containers"]
    assert container["command"] == ["sleep", "infinity"]
    assert spec["activeDeadlineSeconds"] <= 86400
    assert spec["restartPolicy"] == "Never"


@pytest.mark.parametrize("name", PODS)
def test_the_pods_of_the_first_day_are_let_in(name: str) -> None:
    """The namespace takes only pods of the strictest kind."""
    assert (
        one("Namespace", "wan")["metadata"]["labels"]["pod-security.kubernetes.io/enforce"]
        == "restricted"
    )
    spec = pod(name)["spec"]
    assert spec["automountServiceAccountToken"] is False
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert spec["containers"][0]["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def test_the_first_key_reaches_valkey_and_the_models_can_be_written() -> None:
    first, fill = pod("first-key"), pod("fill-models")
    selector = one("NetworkPolicy", "clients-use-valkey")["spec"]["podSelector"]["matchLabels"]
    assert selector.items() <= first["metadata"]["labels"].items()
    (mount,) = fill["spec"]["containers"][0]["volumeMounts"]
    assert "readOnly" not in mount
    (volume,) = fill["spec"]["volumes"]
    assert volume["persistentVolumeClaim"] == {"claimName": "wan-models"}
    worker = one("Deployment", "wan-worker")["spec"]["template"]["spec"]
    assert fill["spec"]["securityContext"]["fsGroup"] == worker["securityContext"]["fsGroup"]


@pytest.mark.parametrize("name", PODS)
def test_the_documented_command_puts_the_registry_in(name: str) -> None:
    text = (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")
    (expression,) = re.findall(r"sed '([^']+)' deploy/k8s/\$pod.yaml", text)
    assert f"sed '{expression}' deploy/k8s/{name}.yaml" in (K8S / f"{name}.yaml").read_text()
    sed = shutil.which("sed")
    assert sed
    changed = subprocess.run(
        [sed, expression, K8S / f"{name}.yaml"], capture_output=True, text=True, check=True
    ).stdout
    (container,) = yaml.safe_load(changed)["spec"]["containers"]
    assert container["image"].startswith("registry.example.com/wan-service:")
