"""Test the doctor on a card: kernels with timings and a tiny job in each mode."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.npu.card.conftest import CONFIG
from worker.config import load_config
from worker.device import Device
from worker.doctor import card
from worker.doctor.examination import examine
from worker.doctor.report import Report

pytestmark = pytest.mark.npu


def test_a_card_that_is_sound_passes(
    npu: Device, session_redis: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "REDIS_URL": f"{session_redis.rpartition('/')[0]}/2",
        "ARTIFACTS_URL": (tmp_path / "artifacts").as_uri(),
        "WORKER_DEVICE": "npu",
        "WORKER_THREADS": "1",
        "WORKER_CONFIG": str(CONFIG),
        # Where CANN itself is set up; the stand-in for it has no version.
        "ASCEND_HOME_PATH": str(tmp_path),
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(card, "_TOKENS", 64)  # the simulated card computes on the host
    lines: list[str] = []
    report = Report(lines.append)
    with ExitStack() as opened:
        examine(report, None, opened)
    print("\n".join(lines))  # what an operator sees
    assert report.is_sound, lines
    checks = {check.name: check for check in report.checks}
    assert checks["device"].figures["kind"] == "npu"
    assert npu.name in checks["device"].detail
    for mode in (each.name for each in load_config(CONFIG).modes):
        assert checks[f"tiny job in {mode}"].status == "ok"
        assert f"{mode} on " in checks["kernels"].detail
