"""Test `python -m worker`: what it logs at its start, and how it ends when it cannot start."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Never

import numpy as np
import pytest
import torch
import typer
from redis import Redis

from deploy.local.waiting import wait_until
from jobs import catalog, redis_keys
from jobs.record import Video
from jobs.state import JobState
from jobs.store.job_store import JobStore
from tests.support.launcher import decode_video
from tests.support.requests import generation_request
from worker.errors import EXIT_DEVICE_LOST
from worker.process.ready_file import why_not_ready
from worker.startup import main

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def environment(redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A valid environment, for this process and its children."""
    values = {
        "REDIS_URL": redis_url,
        "ARTIFACTS_URL": (tmp_path / "artifacts").as_uri(),
        "WORKER_DEVICE": "cpu",
        "WORKER_THREADS": "1",
        "WORKER_READY_FILE": str(tmp_path / "ready"),
    }
    for name, value in values.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def worker(
    environment: None, config_file: Path, tmp_path: Path
) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """A worker process with the miniature, and the file it logs to."""
    log = tmp_path / "worker.log"
    command = [sys.executable, "-m", "worker", "--config", str(config_file)]
    with log.open("wb") as out:
        process = subprocess.Popen(command, cwd=ROOT, stderr=out, env=os.environ)
    yield process, log
    process.kill()
    process.wait()


def wait_for_line(process: subprocess.Popen[bytes], log: Path, pattern: str) -> str:
    found: list[str] = []

    def is_logged() -> bool:
        has_ended, text = process.poll() is not None, log.read_text(encoding="utf-8")
        found.extend(match.group() for match in re.finditer(pattern, text, re.MULTILINE))
        assert found or not has_ended, f"the worker ended: {text}"
        return bool(found)

    wait_until(is_logged, 120, f"{pattern!r} is logged", log.read_text, every_s=0.1)
    return found[0]


def test_a_worker_logs_what_it_loaded_serves_a_job_and_ends_on_sigterm(
    worker: tuple[subprocess.Popen[bytes], Path], redis: Redis, store: JobStore, tmp_path: Path
) -> None:
    process, log = worker
    assert why_not_ready() is not None
    wait_for_line(process, log, r"ready: wan-mini\.")
    assert why_not_ready() is None
    (offer,) = catalog.read(redis).offers
    assert [mode.name for mode in offer.modes] == ["bf16", "w8a8"]
    assert offer.model.tokenizer is not None
    assert catalog.read_tokenizer(redis, offer.model.tokenizer) is not None
    job = store.create(
        generation_request(mode="w8a8", num_frames=5, num_inference_steps=1), offer.queue
    ).job
    wait_for_line(process, log, rf"{job.id}\] succeeded")
    record = store.get(job.id)
    assert record.state is JobState.SUCCEEDED
    assert record.video is not None
    assert record.video.num_frames == 5
    show_the_frames(record.video, tmp_path / "artifacts")
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    assert not (tmp_path / "ready").exists()
    output = log.read_text(encoding="utf-8")
    for line in (
        r"model: wan-mini \(sha256-full-v2:[0-9a-f]{64}\)",
        "device: cpu, 1 thread",
        "modes: bf16, w8a8",
        "mode w8a8: 350 linears in 35 of 40 blocks quantized",
        r"mode bf16: [0-9,]+ bytes",
        r"mode w8a8: [0-9,]+ bytes",
        r"seconds to ready: [0-9.]+",
        "ready: wan-mini",
    ):
        assert re.search(line, output), line
    assert "Traceback" not in output
    assert generation_request().prompt not in output


def show_the_frames(video: Video, artifacts: Path) -> None:
    """Check that the pictures show the frames of the MP4, which is compressed in another way."""
    frames = decode_video(artifacts / video.key).astype(int)
    thumbnail, sheet = video.thumbnail, video.spritesheet
    assert thumbnail is not None
    assert sheet is not None
    (small,) = decode_video(artifacts / thumbnail.key, thumbnail.width, thumbnail.height)
    assert np.abs(small - frames[2]).mean() < 6
    assert (sheet.columns, sheet.rows, sheet.frames) == (3, 2, (0, 1, 2, 3, 4))
    (grid,) = decode_video(artifacts / sheet.key, sheet.width, sheet.height)
    for number in sheet.frames:
        row, column = divmod(number, sheet.columns)
        cell = grid[row * 96 : (row + 1) * 96, column * 96 : (column + 1) * 96]
        assert np.abs(cell - frames[number]).mean() < 6


FAULTS = {
    "no config": ({}, "none.toml", "no configuration file .*none.toml"),
    "no Redis": (
        {"REDIS_URL": "redis://127.0.0.1:1/0"},
        None,
        "Redis cannot be reached: .*127.0.0.1:1.* REDIS_URL",
    ),
    "not a Redis": (
        {"REDIS_URL": "http://127.0.0.1"},
        None,
        "REDIS_URL cannot be used: it does not start with",
    ),
    "no artifacts": ({"ARTIFACTS_URL": ""}, None, "ARTIFACTS_URL: Field required"),
    "a file": ({"ARTIFACTS_URL": "file:///dev/null"}, None, "ARTIFACTS_URL .* cannot be used"),
    "a web page": ({"ARTIFACTS_URL": "https://a"}, None, "ARTIFACTS_URL is 'https://a'"),
    "no bucket": (
        {
            "ARTIFACTS_URL": "s3://bucket?endpoint=http://127.0.0.1:1",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
        },
        None,
        "The bucket bucket cannot be used: the bucket does not answer",
    ),
    "no such device": ({"WORKER_DEVICE": "tpu"}, None, "WORKER_DEVICE: Input should be 'auto'"),
    "no npu": ({"WORKER_DEVICE": "npu"}, None, "WORKER_DEVICE is 'npu'"),
    "no threads": ({"WORKER_THREADS": "0"}, None, "WORKER_THREADS: .*greater than"),
    "no scales": ({}, "unscaled.toml", "there is no scales file .*-m quant calibrate"),
    "no ffmpeg": (
        {"IMAGEIO_FFMPEG_EXE": "/nowhere/ffmpeg"},
        None,
        "This worker cannot make videos, because encoding the MP4 failed .*ffmpeg does not start",
    ),
    "no model": ({}, "unmodelled.toml", "model folder .*nowhere lacks model_index.json"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.usefixtures("environment")
def test_a_fault_ends_the_start_with_one_line_and_a_status(
    fault: str,
    config_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    variables, config, message = FAULTS[fault]
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    text = config_file.read_text(encoding="utf-8")
    (tmp_path / "unscaled.toml").write_text(text, encoding="utf-8")
    nowhere = re.sub(r"(?m)^path = .*", 'path = "nowhere"', text)
    (tmp_path / "unmodelled.toml").write_text(nowhere, encoding="utf-8")
    with pytest.raises(typer.Exit) as caught:
        main(tmp_path / config if config else config_file)
    assert caught.value.exit_code == 1
    output = capsys.readouterr().err.splitlines()
    assert re.match(f"worker: .*{message}", output[-1]), output
    assert not any("Traceback" in line for line in output)


@pytest.mark.usefixtures("environment")
def test_a_share_that_is_not_mounted_ends_the_start(
    config_file: Path, redis: Redis, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its mount point, an empty folder, takes files: videos would be lost there."""
    redis.set(redis_keys.ARTIFACTS_ID, "0" * 32)
    with pytest.raises(typer.Exit) as caught:
        main(config_file)
    assert caught.value.exit_code == 1
    output = capsys.readouterr().err.splitlines()
    assert re.match("worker: The artifact store is missing: .* has no marker", output[-1]), output
    assert list((tmp_path / "artifacts").iterdir()) == []


@pytest.mark.usefixtures("environment")
def test_a_device_that_fails_at_the_start_ends_the_process_at_once(
    config_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A normal exit would make Python wait for the device once more."""

    def fail(*_: object) -> Never:
        raise torch.AcceleratorError("CUDA error: unspecified launch failure\nCompile with `X`")

    def leave(status: int) -> Never:
        raise Left(status)

    class Left(BaseException):
        pass

    monkeypatch.setattr("worker.startup.start", fail)
    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(Left, match=str(EXIT_DEVICE_LOST)):
        main(config_file)
    output = capsys.readouterr().err.splitlines()
    assert output == [
        "worker: The device has failed: CUDA error: unspecified launch failure Compile with `X`"
    ]


def test_the_process_ends_with_a_status_and_without_a_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "worker", "--config", str(tmp_path / "none.toml")]
    environment = os.environ | {"ARTIFACTS_URL": tmp_path.as_uri()}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=False)
    assert done.returncode == 1
    assert done.stderr.decode().startswith("worker: There is no configuration file")
    assert done.stderr.count(b"\n") == 1
