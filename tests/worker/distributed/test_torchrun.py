"""Test `torchrun -m worker`: two ranks serve jobs as one worker, and end together.

On a machine with two NVIDIA GPUs also on those:
`TRITON_INTERPRET=0 pytest -m cuda tests/worker/distributed/test_torchrun.py`.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from redis import Redis
from torch.distributed.run import get_args_parser

from deploy.local.child_process import MARK, marked_processes
from deploy.local.waiting import wait_until
from jobs import catalog
from jobs.state import JobState
from jobs.store.job_store import JobStore
from tests.support.requests import generation_request
from tests.support.worker_processes import has_ended, is_denoising, wait_for
from worker.config import WorkerConfig
from worker.errors import ConfigError
from worker.settings import WorkerSettings
from worker.startup import join_ranks

ROOT = Path(__file__).resolve().parents[3]


class Torchrun:
    """A torchrun with two ranks, and their log."""

    def __init__(self, config: Path, log: Path, **variables: str) -> None:
        self._log = log
        self._mark = uuid.uuid4().hex  # torchrun gives each rank a session of its own
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        # A machine's own name need not resolve; GLOO_SOCKET_IFNAME does the same for gloo.
        command += ["--local-addr", "127.0.0.1", "--nproc-per-node", "2"]
        if "--shutdown-timeout" in get_args_parser().format_help():  # torch 2.11 has 30 s for all
            command += ["--shutdown-timeout", "60"]
        command += ["-m", "worker", "--config", str(config)]
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=os.environ | variables | {MARK: self._mark},
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    def log_text(self) -> str:
        return self._log.read_text(encoding="utf-8")

    def wait_for_line(self, pattern: str) -> str:
        found: list[str] = []

        def is_logged() -> bool:
            has_ended, text = self.process.poll() is not None, self.log_text()
            found.extend(match.group() for match in re.finditer(pattern, text, re.MULTILINE))
            assert found or not has_ended, f"torchrun ended: {text}"
            return bool(found)

        wait_until(is_logged, 150, f"{pattern!r} is logged", self.log_text, every_s=0.1)
        return found[0]

    def kill(self) -> None:
        """End torchrun and, also where a test failed, its ranks."""
        for pid in marked_processes(self._mark):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def kind(request: pytest.FixtureRequest) -> str:
    """The kind of device that the ranks use."""
    if request.param == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip(f"two devices are needed, and here are {torch.cuda.device_count()}")
    return str(request.param)


@pytest.fixture
def variables(redis_url: str, tmp_path: Path, kind: str) -> dict[str, str]:
    """The environment of both ranks."""
    return {
        "REDIS_URL": redis_url,
        "ARTIFACTS_URL": (tmp_path / "artifacts").as_uri(),
        "WORKER_DEVICE": kind,
        "WORKER_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }


@pytest.fixture
def torchrun(config_file: Path, tmp_path: Path, variables: dict[str, str]) -> Iterator[Torchrun]:
    run = Torchrun(config_file, tmp_path / "log", **variables)
    yield run
    run.kill()


def test_two_ranks_are_one_worker(
    torchrun: Torchrun, kind: str, redis: Redis, store: JobStore
) -> None:
    torchrun.wait_for_line(r"ready: wan-mini\.")
    (offer,) = catalog.read(redis).offers
    device_name = "cpu, 1 thread" if kind == "cpu" else torch.cuda.get_device_name()
    assert offer.device == f"2 x {device_name}"

    short = generation_request(mode="w8a8", num_frames=5, num_inference_steps=1)
    done = store.create(short, offer.queue).job
    long = generation_request(num_frames=1, num_inference_steps=50)
    cancelled = store.create(long, offer.queue).job
    assert wait_for(store, done.id, has_ended).state is JobState.SUCCEEDED
    wait_for(store, cancelled.id, is_denoising)
    store.cancel(cancelled.id)
    assert wait_for(store, cancelled.id, has_ended, 10).state is JobState.CANCELLED
    # The follower also logs the job, and why it ended.
    torchrun.wait_for_line(rf"\[rank-1 {cancelled.id}\].*rank 0: GenerationCancelled")

    last = store.create(generation_request(num_frames=1, num_inference_steps=8), offer.queue).job
    wait_for(store, last.id, is_denoising)
    torchrun.process.send_signal(signal.SIGTERM)
    torchrun.process.wait(60)
    assert store.get(last.id).state is JobState.SUCCEEDED, "a drain finishes the current job"
    assert catalog.read(redis).offers == ()
    log = torchrun.log_text()
    assert "the process ends" not in log, "the leader shut the follower down"
    with pytest.raises(ProcessLookupError):
        os.killpg(torchrun.process.pid, 0)


def test_a_proof_that_fails_ends_both_ranks(
    config_file: Path, tmp_path: Path, variables: dict[str, str], redis: Redis
) -> None:
    """The leader fails after both have denoised the tiny job; the follower must not wait for it."""
    variables["IMAGEIO_FFMPEG_EXE"] = str(tmp_path / "none")
    run = Torchrun(config_file, tmp_path / "log", **variables)
    try:
        run.wait_for_line(r"This worker cannot make videos, because encoding the MP4 failed")
        assert run.process.wait(90) != 0
    finally:
        run.kill()
    assert "ready: wan-mini" not in run.log_text()
    assert catalog.read(redis).offers == ()


def test_a_number_of_ranks_that_does_not_divide_is_refused_before_waiting_for_others(
    config: WorkerConfig,
) -> None:
    settings = WorkerSettings(
        artifacts_url="file:///none", device="cpu", threads=1, world_size=3, rank=1, local_rank=1
    )
    with (
        pytest.raises(ConfigError, match=r"3 ranks share .* 4 attention heads"),
        join_ranks(settings, config),
    ):
        pass
