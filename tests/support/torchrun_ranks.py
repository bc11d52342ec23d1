"""Cards of one job as processes on the CPU: `python -m tests.support.torchrun_ranks CONFIG FOLDER`

Imports once and forks. First one card alone, then a team of two, then one of four. The leader of a
team runs the jobs of `JOBS` in turn and leaves in FOLDER/<cards> the latents of each; then jobs
that end badly, with the name of the error that each ended with. A card that is to fail finds a file
there that says how. `statuses.json` has the exit statuses of a team.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jobs.errors import GenerationCancelled
from jobs.record import Stage
from jobs.spec import GenerationRequest
from tests.support.job_controls import Unwatched
from tests.support.requests import OWNER, order
from worker.config import WorkerConfig, load_config
from worker.device import pick_device
from worker.distributed.follower import follow, load_follower
from worker.distributed.rank_group import meet
from worker.engine.denoiser import Denoise, Embeddings, OnStep
from worker.engine.wan_engine import WanEngine
from worker.startup import load_engine

TEAMS = (2, 4)
TINY: dict[str, Any] = {"num_frames": 1, "num_inference_steps": 1}
JOBS: dict[str, dict[str, Any]] = {
    "bf16": {"num_frames": 5, "num_inference_steps": 2},
    "w8a8": {"num_frames": 1, "num_inference_steps": 2, "mode": "w8a8"},
    "unguided": {"num_frames": 9, "num_inference_steps": 1, "guidance_scale": 1.0},
    "tiny": TINY,
}
FAULTS = {
    "the leader is told to stop": (0, "stop"),
    "a follower's memory is full": (1, "full"),
    "the leader's memory is full": (0, "full"),
    "a follower fails": (1, "fail"),
}
FULL = "a follower's memory is full"
LAST = "a follower dies"


class StopAfterStep(Unwatched):
    def progress(self, stage: Stage, step: int, steps: int) -> None:
        if stage is Stage.DENOISE and step == 1:
            raise GenerationCancelled("the test said so")


class Recorder:
    """A denoising that keeps its latents."""

    def __init__(self, inner: Denoise) -> None:
        self.latents = torch.empty(0)
        self._inner = inner

    def __call__(
        self, pipeline: Any, request: GenerationRequest, embeddings: Embeddings, on_step: OnStep
    ) -> Tensor:
        self.latents = self._inner(pipeline, request, embeddings, on_step)
        return self.latents


def record(engine: WanEngine) -> Callable[..., np.ndarray]:
    """How to run a job, as changes of `order`, and get its latents; frames are not decoded."""
    recorder = engine._denoise = Recorder(engine._denoise)

    def latents_of(watch: Unwatched, **changes: object) -> np.ndarray:
        engine.generate(order(**changes), watch, OWNER)
        return recorder.latents.numpy()

    return latents_of


def may_fail(transformer: Any, rank: int, folder: Path) -> None:
    """Have a transformer fail in its middle when the file says so, once."""
    wish = folder / f"fault-{rank}"

    def look(*_: object) -> None:
        if not wish.exists():
            return
        how = wish.read_text()
        wish.unlink()
        if how == "full":
            raise MemoryError("the test said so")
        if how == "fail":
            raise ArithmeticError("the test said so")
        os.kill(os.getpid(), signal.SIGKILL)

    transformer.blocks[20].register_forward_pre_hook(look)


def faults_of(world: int) -> dict[str, tuple[int, str]]:
    """All of them with two cards; with four, where all steps are the same, one."""
    return FAULTS if world == 2 else {FULL: FAULTS[FULL]}


def lead_team(engine: WanEngine, world: int, folder: Path) -> None:
    latents_of = record(engine)
    for name, wanted in JOBS.items():
        np.save(folder / f"{name}.npy", latents_of(Unwatched(), **wanted))
    ended = {}
    faults = faults_of(world) | {LAST: (world - 1, "die")}
    for name, (rank, fault) in faults.items():
        watch = StopAfterStep() if fault == "stop" else Unwatched()
        if fault != "stop":
            (folder / f"fault-{rank}").write_text(fault)
        try:
            latents_of(watch, **TINY)
        except Exception as error:  # noqa: BLE001  # which one it is, is the test's question
            ended[name] = [type(error).__name__, engine.device.is_lost(error)]
        if name != LAST:
            np.save(folder / f"after {name}.npy", latents_of(Unwatched(), **TINY))
    (folder / "ended.json").write_text(json.dumps(ended))


def run_card(rank: int, world: int, config: WorkerConfig, folder: Path) -> int:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    device = pick_device("cpu", threads=1)
    if world == 1:
        latents_of = record(load_engine(config, device))
        for name, wanted in JOBS.items():
            np.save(folder / f"{name}.npy", latents_of(Unwatched(), **wanted))
        return 0
    with meet(device) as cards:
        if rank > 0:
            modes = load_follower(config, cards)
            for mode in modes:
                may_fail(mode.transformer, rank, folder)
            return follow(cards, modes)
        engine = load_engine(config, device, cards)
        for mode in engine.loaded.values():
            may_fail(mode.transformer, rank, folder)
        lead_team(engine, world, folder)
    return 0


def run_team(world: int, card: Callable[[int], int]) -> list[int]:
    """Fork `world` cards and wait for them; their exit statuses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        os.environ |= {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(probe.getsockname()[1]),
        }
    pids = []
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                status = card(rank)
            except BaseException:  # noqa: BLE001  # no fork may go on as its parent
                traceback.print_exc()
            os._exit(status)
        pids.append(pid)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def main() -> None:
    config, folder = load_config(Path(sys.argv[1])), Path(sys.argv[2])
    torch.set_num_threads(1)
    for world in (1, *TEAMS):
        own = folder / str(world)
        own.mkdir()
        statuses = run_team(world, lambda rank: run_card(rank, world, config, own))  # noqa: B023
        (own / "statuses.json").write_text(json.dumps(statuses))


if __name__ == "__main__":
    main()
