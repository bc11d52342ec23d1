"""Test a start: garbage collection is paused meanwhile, and a device that fails has its status."""

from __future__ import annotations

import gc
import os
import sys
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
import typer

from worker import __main__ as entry
from worker import startup
from worker.errors import EXIT_DEVICE_LOST, StartError
from worker.settings import WorkerSettings
from worker.startup import paused_gc


def test_it_is_paused_until_the_start_is_over() -> None:
    with paused_gc():
        assert not gc.isenabled()
        assert gc.get_freeze_count() > 100_000, "imported objects are excluded"
    assert gc.isenabled()


def test_objects_made_meanwhile_are_excluded_and_their_garbage_is_freed() -> None:
    class Node:
        pass

    with paused_gc():
        kept = [Node() for _ in range(1000)]
        cycle = Node()
        cycle.itself = cycle  # type: ignore[attr-defined]
        gone = weakref.ref(cycle)
        del cycle
        assert gone() is not None
    assert gone() is None
    tracked = {id(each) for each in gc.get_objects()}
    assert tracked.isdisjoint(map(id, kept))


def test_it_runs_again_after_a_start_that_failed() -> None:
    with pytest.raises(KeyError), paused_gc():
        raise KeyError
    assert gc.isenabled()


def test_it_is_paused_while_the_worker_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    # Or they would be set for other tests.
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    monkeypatch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "1")
    monkeypatch.setenv("PYTORCH_NPU_ALLOC_CONF", "expandable_segments:False")
    monkeypatch.setattr(sys, "argv", ["python -m worker"])
    enabled: list[bool] = []
    monkeypatch.setattr(typer, "run", lambda _main: enabled.append(gc.isenabled()))
    entry.run()
    assert enabled == [False]
    assert os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] == "0", "torch would import torch_npu"
    assert os.environ["PYTORCH_NPU_ALLOC_CONF"] == "expandable_segments:False", "it was set"


@pytest.mark.parametrize("begin", [startup.start, startup.start_follower])
def test_it_is_paused_while_the_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, begin: Callable[..., object]
) -> None:
    enabled: list[bool] = []

    def load(_path: Path) -> None:
        enabled.append(gc.isenabled())
        raise StartError("enough seen")

    monkeypatch.setattr(startup, "load_config", load)
    monkeypatch.setenv("ARTIFACTS_URL", "file:///nowhere")
    with pytest.raises(StartError, match="enough seen"), ExitStack() as opened:
        begin(WorkerSettings(), Path("worker.toml"), opened)
    assert enabled == [False]
    assert gc.isenabled()


class Ended(BaseException):
    """In place of the end of the process."""


def ended_by(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str]:
    """Return the status and the line of a start whose loading raises `error`."""

    def load(_path: Path) -> None:
        raise error

    def leave(status: int) -> None:
        raise Ended(status)

    monkeypatch.setattr(startup, "load_config", load)
    monkeypatch.setattr(startup, "configure_logging", lambda _format: None)
    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setenv("ARTIFACTS_URL", "file:///nowhere")
    with pytest.raises((Ended, typer.Exit)) as caught:
        startup.main(Path("worker.toml"))
    status = (
        caught.value.exit_code if isinstance(caught.value, typer.Exit) else caught.value.args[0]
    )
    return status, capsys.readouterr().err


def test_a_device_that_fails_during_the_start_has_its_own_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = RuntimeError(
        "npuSynchronizeDevice:build/CMakeFiles/torch_npu.dir/compiler_depend.ts:479 NPU function "
        "error: AclrtSynchronizeDeviceWithTimeout, error code is 507899\n[ERROR] ERR00100 PTA call"
    )
    status, line = ended_by(error, monkeypatch, capsys)
    assert status == EXIT_DEVICE_LOST
    assert line.startswith("worker: The device has failed: npuSynchronizeDevice:")
    assert line.count("\n") == 1


@pytest.mark.parametrize(
    "error", [RuntimeError("NPU out of memory. Tried to allocate 2.00 GiB"), MemoryError("full")]
)
def test_a_device_that_is_full_during_the_start_is_no_lost_one(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, line = ended_by(error, monkeypatch, capsys)
    assert status == 1
    assert line.startswith("worker: The device has too little memory for the model: ")


def test_a_fault_of_the_code_keeps_its_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RuntimeError, match="shape mismatch"):
        ended_by(RuntimeError("shape mismatch"), monkeypatch, capsys)
