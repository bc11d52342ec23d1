"""Test what a worker asks of a Ray cluster, and how it is started there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from deploy.local.errors import LocalError
from deploy.ray.plan import WorkerPlan, environment_of

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(
    ("plan", "demand", "bundle"),
    [
        (
            WorkerPlan("npu"),
            {"num_cpus": 1.0, "num_gpus": 0, "resources": {"NPU": 1}},
            {"CPU": 1.0, "NPU": 1},
        ),
        (
            WorkerPlan("npu", cards=4, resource="Ascend910", cpus=8),
            {"num_cpus": 8, "num_gpus": 0, "resources": {"Ascend910": 4}},
            {"CPU": 8.0, "Ascend910": 4},
        ),
        (
            WorkerPlan("cuda", cards=2),
            {"num_cpus": 1.0, "num_gpus": 2, "resources": {}},
            {"CPU": 1.0, "GPU": 2.0},
        ),
        (WorkerPlan("cpu"), {"num_cpus": 1.0, "num_gpus": 0, "resources": {}}, {"CPU": 1.0}),
    ],
)
def test_the_cards_of_a_worker_are_asked_for(
    plan: WorkerPlan, demand: dict[str, Any], bundle: dict[str, float]
) -> None:
    assert plan.demand == demand
    assert plan.bundle == bundle


def test_one_card_is_an_ordinary_worker_and_several_are_torchruns() -> None:
    assert WorkerPlan("npu").command() == ["python", "-m", "worker"]
    plan = WorkerPlan("cuda", cards=4, python="/venv/bin/python", config="wan.toml")
    assert plan.command()[:3] == ["/venv/bin/python", "-m", "torch.distributed.run"]
    text = " ".join(plan.command())
    assert "--standalone --nproc-per-node 4 --shutdown-timeout" in text
    assert text.endswith("-m worker --config wan.toml")


def test_workers_get_the_settings_of_workers_and_what_is_named() -> None:
    launcher = {
        "REDIS_URL": "redis://r",
        "WORKER_DRAIN": "requeue",
        "WORKER_READY_FILE": "/ready",
        "SERVICE_PORT": "1",
        "HCCL_CONNECT_TIMEOUT": "600",
    }
    assert environment_of(launcher, "npu", ("HCCL_CONNECT_TIMEOUT",)) == {
        "WORKER_DEVICE": "npu",
        "REDIS_URL": "redis://r",
        "WORKER_DRAIN": "requeue",
        "HCCL_CONNECT_TIMEOUT": "600",
    }
    with pytest.raises(LocalError, match="the variable NOWHERE is not set here"):
        environment_of(launcher, "npu", ("NOWHERE",))


def test_without_ray_one_line_says_what_to_install() -> None:
    command = [sys.executable, "-m", "deploy.ray", "status", "--address", "127.0.0.1:1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("deploy.ray: Ray is not installed: run pip install '.[ray]'")
    assert done.stderr.count("\n") == 1
