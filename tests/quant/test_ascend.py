"""Test what is said where `torch_npu` cannot be imported or finds no card."""

from __future__ import annotations

import glob
import importlib
import importlib.metadata
import re
from pathlib import Path

import pytest
import torch

from quant import ascend
from quant.device import unavailable_reason

CUDA_BESIDE = (
    "Two accelerators cannot be used at the same time in PyTorch: npu and cuda. You can install "
    "the cpu version of PyTorch to use your npu device, or use the cuda device with 'export "
    "TORCH_DEVICE_BACKEND_AUTOLOAD=0'.\n[ERROR] (PID:42, Device:-1, RankID:-1) ERR00007"
)
NO_HCCL = "libhccl.so: cannot open shared object file: No such file or directory"
NO_DRIVER = "libascend_hal.so: cannot open shared object file: No such file or directory"
OTHER_TORCH = "/x/libtorch_npu.so: undefined symbol: _ZN3c1010ValueErrorC1ENS_14SourceLocationE"
OWN = ".".join(torch.__version__.split(".")[:2])


@pytest.fixture(autouse=True)
def _no_cann(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*ascend.CANN_VARIABLES, "ASCEND_RT_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)


def problem(
    monkeypatch: pytest.MonkeyPatch, error: Exception | None, version: str = f"{OWN}.0"
) -> str | None:
    """Return what is said if `import torch_npu` of a version raises `error`."""

    def import_module(name: str) -> None:
        assert name == "torch_npu"
        if error is not None:
            raise error

    monkeypatch.setattr(importlib.metadata, "version", lambda _name: version)
    monkeypatch.setattr(importlib, "import_module", import_module)
    return ascend.import_problem()


def test_it_names_the_release_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(_name: str) -> str:
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(importlib.metadata, "version", version)
    found = ascend.import_problem()
    assert found is not None
    assert re.match(rf"torch_npu is not installed; .* torch {OWN}.*, torch_npu {OWN}$", found)


@pytest.mark.parametrize(("torch_version", "fits"), [("2.13.0+cpu", "2.13"), ("2.10.0", "2.10")])
def test_it_says_which_pair_goes_together(
    monkeypatch: pytest.MonkeyPatch, torch_version: str, fits: str
) -> None:
    monkeypatch.setattr(torch, "__version__", torch_version)
    found = problem(monkeypatch, AssertionError("it must not be imported"), "2.12.0.post2")
    assert found == (
        f"torch_npu 2.12.0.post2 does not go with torch {torch_version}: it needs torch 2.12; "
        f"install that, or torch_npu {fits}"
    )


def test_a_torch_that_has_no_partner_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.9.1")
    found = problem(monkeypatch, None, "2.13.0")
    assert found is not None
    assert found.endswith(
        "or torch and torch_npu of one release out of 2.10, 2.11, 2.12, 2.13, 2.14"
    )


MESSAGES = {
    "CANN is not there": (ImportError(NO_HCCL), r"libhccl.so of CANN is missing: install CANN"),
    "no driver": (ImportError(NO_DRIVER), r"libascend_hal.so of the Ascend driver is missing"),
    "CUDA beside": (RuntimeError(CUDA_BESIDE), r"built for CUDA .* \+cpu\), or use the GPU"),
    "other torch": (ImportError(OTHER_TORCH), r"finds no _ZN3c10.* the pair that requirements/npu"),
    "anything else": (OSError("disk on fire\nmore"), r"imported \(OSError: disk on fire\)$"),
}


@pytest.mark.parametrize("what", MESSAGES)
def test_each_cause_has_its_sentence(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    error, expected = MESSAGES[what]
    found = problem(monkeypatch, error)
    assert found is not None
    assert re.search(expected, found), found
    assert "\n" not in found


def test_cann_that_is_installed_has_to_be_sourced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ascend, "_CANN_FOLDERS", (str(tmp_path / "none"), str(tmp_path)))
    script = tmp_path / "set_env.sh"
    script.touch()
    found = problem(monkeypatch, ImportError(NO_HCCL))
    assert found == f"libhccl.so of CANN is not found: run 'source {script}' before the start"
    monkeypatch.setenv("ASCEND_HOME_PATH", "/opt/cann")
    found = problem(monkeypatch, ImportError(NO_HCCL))
    assert found is not None
    assert "libhccl.so of CANN is missing, although CANN is set up in /opt/cann" in found


def test_an_import_that_works_may_find_no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    class Npu:
        error: Exception | None = None

        @classmethod
        def is_available(cls) -> bool:
            if cls.error is not None:
                raise cls.error
            return False

    monkeypatch.setattr(torch, "npu", Npu, raising=False)
    assert problem(monkeypatch, None) is None
    monkeypatch.setattr(glob, "glob", lambda _pattern: [])
    assert "no /dev/davinci0" in str(unavailable_reason("npu"))
    monkeypatch.setattr(glob, "glob", lambda _pattern: ["/dev/davinci0"])
    assert "another container may hold it" in str(unavailable_reason("npu"))
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "4")
    assert "ASCEND_RT_VISIBLE_DEVICES is '4'" in str(unavailable_reason("npu"))
    Npu.error = RuntimeError("aclrtGetDeviceCount(&device_count), error code is 507033")
    assert "the card does not start (ACL error 507033)" in str(unavailable_reason("npu"))
