"""Test the doctor: a sound worker passes, and each fault is found with its remedy."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner, Result

from worker.device import Device
from worker.doctor import card, system
from worker.doctor.command import doctor
from worker.doctor.examination import examine
from worker.doctor.report import Check, Fault, Finding, Report

ROOT = Path(__file__).resolve().parents[3]
PASSWORD = "correct-horse"


@pytest.fixture(autouse=True)
def environment(redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of a worker that can serve."""
    for name, value in {
        "REDIS_URL": redis_url,
        "ARTIFACTS_URL": (tmp_path / "artifacts").as_uri(),
        "WORKER_DEVICE": "cpu",
        "WORKER_THREADS": "1",
    }.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    """The shipped configuration of the miniature, with its shipped scales."""
    text = (ROOT / "deploy" / "wan-mini.toml").read_text(encoding="utf-8")
    path = tmp_path / "worker.toml"
    path.write_text(text.replace('"../models', f'"{ROOT}/models'), encoding="utf-8")
    return path


def edit(config: Path, old: str, new: str) -> None:
    text = config.read_text()
    assert old in text
    config.write_text(text.replace(old, new))


def examined(config: Path) -> Report:
    report = Report()
    with ExitStack() as opened:
        examine(report, config, opened)
    for check in report.checks:
        assert (check.status == "failed") <= bool(check.remedy), check
    return report


def by_name(report: Report) -> dict[str, Check]:
    return {check.name: check for check in report.checks}


def test_a_sound_worker_passes_and_nothing_is_left(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    lines: list[str] = []
    report = Report(lines.append)
    with ExitStack() as opened:
        examine(report, config_file, opened)
    assert report.is_sound, lines
    assert report.summary() == "This worker can serve."
    checks = by_name(report)
    assert "valkey" in checks["Redis"].detail
    assert "mode w8a8: 350 linears" in checks["model"].detail
    for mode in ("bf16", "w8a8", "fast", "fast-w8a8"):
        assert checks[f"tiny job in {mode}"].status == "ok"
        assert float(checks[f"tiny job in {mode}"].figures["denoise_s"]) > 0
    assert float(checks["kernels"].figures["w8a8: product of 64 tokens_ms"]) > 0
    assert any(line.startswith("ok      tiny job in w8a8: ") for line in lines)
    assert [each.name for each in tmp_path.iterdir() if each.name.startswith("wan-")] == []


@pytest.fixture
def without_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare the seconds of loading where the fault is found before."""
    monkeypatch.setattr(card, "engine", lambda *_: lambda: None)


@pytest.mark.usefixtures("without_model")
class TestFaults:
    """Each fault is one failed line; what needs it is skipped, and the rest is still checked."""

    def failed(self, config: Path, name: str) -> Check:
        report = examined(config)
        failed = [check.name for check in report.checks if check.status == "failed"]
        assert failed == [name], report.checks
        assert report.summary() == f"This worker cannot serve: {name} failed."
        return by_name(report)[name]

    def test_no_ffmpeg(
        self, config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(tmp_path / "none"))
        check = self.failed(config_file, "ffmpeg")
        assert "No such file" in check.detail
        assert "set IMAGEIO_FFMPEG_EXE to an ffmpeg with libx264" in check.remedy

    def test_no_redis(
        self, config_file: Path, unused_port: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("REDIS_URL", f"redis://me:{PASSWORD}@127.0.0.1:{unused_port}/0")
        check = self.failed(config_file, "Redis")
        assert "Redis cannot be reached: Error 111" in check.detail
        assert "correct REDIS_URL" in check.remedy

    def test_no_artifact_store(self, config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("ARTIFACTS_URL", "file:///proc/none")
        check = self.failed(config_file, "artifact store")
        assert "correct ARTIFACTS_URL" in check.remedy

    def test_no_environment(self, config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("ARTIFACTS_URL")
        check = self.failed(config_file, "settings")
        assert "ARTIFACTS_URL: Field required" in check.detail

    def test_no_configuration(self, tmp_path: Path) -> None:
        check = self.failed(tmp_path / "none.toml", "configuration")
        assert "There is no configuration file" in check.detail

    def test_a_wrong_model_folder(self, config_file: Path, tmp_path: Path) -> None:
        folder = shutil.copytree(ROOT / "models" / "wan-mini", tmp_path / "model")
        (folder / "vae" / "config.json").unlink()
        edit(config_file, f'path = "{ROOT}/models/wan-mini"', f'path = "{folder}"')
        check = self.failed(config_file, "model folder")
        assert "lacks vae/config.json" in check.detail
        assert "copy the model again" in check.remedy

    def test_no_scales(self, config_file: Path) -> None:
        edit(config_file, "boundary-hif8.safetensors", "none.safetensors")
        check = self.failed(config_file, "scales")
        assert "python -m quant calibrate" in check.detail
        assert "run the command" in check.remedy

    @pytest.mark.parametrize("kind", ["cuda", "npu"])
    def test_no_device(self, config_file: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
        if getattr(torch, kind, None) is not None and getattr(torch, kind).is_available():
            pytest.fail("run this test where the device is not there")
        monkeypatch.setenv("WORKER_DEVICE", kind)
        monkeypatch.setenv("ASCEND_HOME_PATH", "/opt/cann")
        check = self.failed(config_file, "device")
        assert f"WORKER_DEVICE is '{kind}', but " in check.detail

    def test_too_little_memory(self, config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Device, "available_bytes", lambda _self: 1 << 20)
        check = self.failed(config_file, "memory plan")
        assert "on the device, which has 0.0 GiB. To make it fit, " in check.detail

    def test_a_card_that_computes_wrong(
        self, config_file: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(torch.Tensor, "__matmul__", lambda left, _right: left)
        check = self.failed(config_file, "device")
        assert "multiplies ones to 4096.0, not to 262144.0" in check.detail


def test_a_lost_device_ends_without_waiting_for_it() -> None:
    def look() -> Finding:
        raise RuntimeError("NPU function error: aclrtSynchronizeDevice, error code is 507899")

    report = Report()
    report.run("device", look)
    assert report.device_lost
    assert "507899" in report.checks[0].detail


def test_nothing_secret_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "bucket-key")
    report = Report()
    report.hide(PASSWORD)

    def look() -> Finding:
        url = f"redis://me:{PASSWORD}@host/0 and redis://:other@host"
        return Finding(f"at {url}", note="bucket-key", figures={"url": url})

    def fail() -> Finding:
        raise Fault(f"at {PASSWORD}", "bucket-key")

    report.run("a", look)
    report.run("b", fail)
    text = report.to_json()
    for secret in (PASSWORD, "other", "bucket-key"):
        assert secret not in text
    assert json.loads(text)["sound"] is False


# ---------------------------------------------------------------------- tools of the drivers


def tool(folder: Path, name: str, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)


def test_the_driver_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert system.driver("cpu") is None
    tool(tmp_path, "npu-smi", "echo '| 0     910B2   | OK   |'", monkeypatch)
    found = system.driver("npu")
    assert found is not None
    assert "910B2" in str(found.figures["line 0"])
    script = "echo 'dcmi model initialized failed, because the device is used. ret is -8020'"
    tool(tmp_path, "npu-smi", script, monkeypatch)
    with pytest.raises(Fault, match="the card is in use") as caught:
        system.driver("npu")
    assert "end the other container" in caught.value.remedy
    tool(tmp_path, "npu-smi", "exit 3", monkeypatch)
    with pytest.raises(Fault, match="npu-smi ends with 3"):
        system.driver("auto")


def test_cann_is_found_with_its_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert system.cann("auto") is None
    with pytest.raises(Fault, match="CANN is not set up"):
        system.cann("npu")
    monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path))
    found = system.cann("npu")
    assert found is not None
    assert found.note is not None
    (tmp_path / "version.cfg").write_text("version=9.1.0\n")
    found = system.cann("auto")
    assert found is not None
    assert found.detail == f"{tmp_path}: version=9.1.0"


def test_versions_that_do_not_go_together(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"torch": "2.13.0+cpu", "torch_npu": "2.12.0"}
    monkeypatch.setattr(system, "_version", versions.get)
    with pytest.raises(Fault, match=r"torch_npu 2.12.0 does not go with torch 2.13") as caught:
        system.versions()
    assert caught.value.remedy == "install that, or torch_npu 2.13"


# ---------------------------------------------------------------------- the command


def files_checked(config: Path, *options: str) -> Result:
    alone = typer.Typer()
    alone.command()(doctor)
    return CliRunner().invoke(alone, ["--files", "--config", str(config), *options])


def test_files_alone_are_checked_without_redis_store_and_device(
    config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REDIS_URL", "redis://nowhere.invalid")
    monkeypatch.setenv("WORKER_DEVICE", "cuda")
    monkeypatch.delenv("ARTIFACTS_URL")
    done = files_checked(config_file)
    assert done.exit_code == 0, done.output
    *lines, last = done.output.splitlines()
    assert [line.partition(":")[0].split(maxsplit=1) for line in lines] == [
        ["ok", "configuration"],
        ["ok", "model folder"],
        ["ok", "scales"],
    ]
    assert last == "The files fit. Device, Redis and artifact store were not looked at."


def test_scales_that_do_not_fit_fail_the_check_of_files(config_file: Path) -> None:
    edit(config_file, "boundary-hif8.safetensors", "boundary-int8.safetensors")
    done = files_checked(config_file)
    assert done.exit_code == 1
    assert done.output.splitlines()[-1] == "This worker cannot serve: scales failed."
    report = json.loads(files_checked(config_file, "--json").output)
    assert [check["status"] for check in report["checks"]] == ["ok", "ok", "failed"]
    assert not report["sound"]


def test_the_command_prints_json_and_fails(config_file: Path, unused_port: int) -> None:
    """Without the model, which a test above loads."""
    edit(config_file, "boundary-hif8.safetensors", "none.safetensors")
    url = f"redis://me:{PASSWORD}@127.0.0.1:{unused_port}/0"
    done = subprocess.run(
        [sys.executable, "-m", "worker", "doctor", "--json", "--config", str(config_file)],
        cwd=ROOT,
        env=os.environ | {"REDIS_URL": url},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    status = {check["name"]: check["status"] for check in report["checks"]}
    assert (status["Redis"], status["scales"]) == ("failed", "failed")
    assert (status["artifact store"], status["model"]) == ("skipped", "skipped")
    assert status["device"] == "ok"
    assert PASSWORD not in done.stdout + done.stderr
