"""Run the ranks of one job as processes on the CPU.

`python -m tests.support.torchrun_ranks CONFIG FOLDER` imports once and forks: first one rank alone,
then two ranks together, then four. The leader runs the jobs of `JOBS` in turn and saves the latents
of each in FOLDER/<world size>. Then it runs jobs that fail, and saves the name of the error that
each ended with. A rank fails if it finds a file in the folder that says how. `statuses.json` has
the exit statuses of all ranks. At last two ranks begin with LoRAs that differ, and each saves its
error in FOLDER/differing.
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
from tests.support.job_controls import IgnoringControl
from tests.support.requests import OWNER, generation_request
from worker.config import WorkerConfig, load_config
from worker.device import Device, DeviceKind, is_lost, pick_device
from worker.distributed.follower import follow, load_follower
from worker.distributed.rank_group import join
from worker.engine.denoiser import Denoise, Embeddings, OnStep
from worker.engine.wan_engine import WanEngine
from worker.errors import StartError
from worker.startup import load_engine

WORLD_SIZES = (2, 4)
TINY: dict[str, Any] = {"num_frames": 1, "num_inference_steps": 1}
JOBS: dict[str, dict[str, Any]] = {
    "bf16": {"num_frames": 5, "num_inference_steps": 2},
    "w8a8": {"num_frames": 1, "num_inference_steps": 2, "mode": "w8a8"},
    "unguided": {"num_frames": 9, "num_inference_steps": 1, "guidance_scale": 1.0},
    "fast": TINY | {"num_inference_steps": 3, "guidance_scale": 1.0, "mode": "fast"},
    "guided fast": TINY | {"num_frames": 5, "mode": "fast"},
    "fp8": {"num_frames": 1, "num_inference_steps": 2, "mode": "fp8"},
    "sparse": TINY | {"num_frames": 5, "guidance_scale": 1.0, "mode": "sparse"},
    "tiny": TINY,
}
FAULTS = {
    "the leader is told to stop": (0, "stop"),
    "a follower's memory is full": (1, "full"),
    "the leader's memory is full": (0, "full"),
    "a follower fails": (1, "fail"),
}
FULL = "a follower's memory is full"
LAST = {2: ("a follower dies", "die"), 4: ("a follower's card is lost", "lost")}
LOST = (
    "npuSynchronizeDevice:build/CMakeFiles/torch_npu.dir/compiler_depend.ts:479 NPU function "
    "error: AclrtSynchronizeDeviceWithTimeout, error code is 507899\n[ERROR] ERR00100 PTA call acl"
)


class LikeAscend(Device):
    """The CPU, with the errors of an Ascend card."""

    def is_lost(self, error: BaseException) -> bool:
        kinds: tuple[DeviceKind, ...] = ("npu",)
        return is_lost(error, kinds)


class StopAfterStep(IgnoringControl):
    def progress(self, stage: Stage, step: int, steps: int) -> None:
        if stage is Stage.DENOISE and step == 1:
            raise GenerationCancelled("the test said so")


class Recorder:
    """A denoising function that keeps the latents of the last job."""

    def __init__(self, inner: Denoise) -> None:
        self.latents = torch.empty(0)
        self._inner = inner

    def __call__(
        self, pipeline: Any, request: GenerationRequest, embeddings: Embeddings, on_step: OnStep
    ) -> Tensor:
        self.latents = self._inner(pipeline, request, embeddings, on_step)
        return self.latents


def record(engine: WanEngine) -> Callable[..., np.ndarray]:
    """Return a function that runs a changed `generation_request` and returns its latents.

    Frames are not decoded.
    """
    recorder = engine._denoise = Recorder(engine._denoise)

    def latents_of(control: IgnoringControl, **changes: object) -> np.ndarray:
        engine.generate(generation_request(**changes), control, OWNER)
        return recorder.latents.float().numpy()  # BF16 by Euler's method

    return latents_of


def install_fault(transformer: Any, rank: int, folder: Path) -> None:
    """Have a transformer fail in its middle, once, when the fault file exists."""
    fault_file = folder / f"fault-{rank}"

    def fail_if_asked(*_: object) -> None:
        if not fault_file.exists():
            return
        how = fault_file.read_text()
        fault_file.unlink()
        if how == "full":
            raise MemoryError("the test said so")
        if how == "lost":
            raise RuntimeError(LOST)
        if how == "fail":
            raise ArithmeticError("the test said so")
        os.kill(os.getpid(), signal.SIGKILL)

    transformer.blocks[20].register_forward_pre_hook(fail_if_asked)


def faults_of(world: int) -> dict[str, tuple[int, str]]:
    """Return all faults for two ranks, and one for four, whose steps are the same."""
    return FAULTS if world == 2 else {FULL: FAULTS[FULL]}


def run_leader(engine: WanEngine, world: int, folder: Path) -> None:
    latents_of = record(engine)
    for name, changes in JOBS.items():
        np.save(folder / f"{name}.npy", latents_of(IgnoringControl(), **changes))
    ended = {}
    last, how = LAST[world]
    faults = faults_of(world) | {last: (world - 1, how)}
    for name, (rank, fault) in faults.items():
        control = StopAfterStep() if fault == "stop" else IgnoringControl()
        if fault != "stop":
            (folder / f"fault-{rank}").write_text(fault)
        try:
            latents_of(control, **TINY)
        except Exception as error:  # noqa: BLE001  # the test checks which one it is
            ended[name] = [type(error).__name__, engine.device.is_lost(error), str(error)]
        if name != last:
            np.save(folder / f"after {name}.npy", latents_of(IgnoringControl(), **TINY))
    (folder / "ended.json").write_text(json.dumps(ended))


def run_rank(rank: int, world: int, config: WorkerConfig, folder: Path) -> int:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    device = LikeAscend("cpu", pick_device("cpu", threads=1).name)
    if world == 1:
        latents_of = record(load_engine(config, device))
        for name, changes in JOBS.items():
            np.save(folder / f"{name}.npy", latents_of(IgnoringControl(), **changes))
        return 0
    with join(device) as ranks:
        if rank > 0:
            modes = load_follower(config, ranks)
            for mode in modes:
                install_fault(mode.transformer, rank, folder)
            return follow(ranks, modes)
        engine = load_engine(config, device, ranks)
        for mode in engine.loaded.values():
            install_fault(mode.transformer, rank, folder)
        run_leader(engine, world, folder)
    return 0


def run_differing(rank: int, config: WorkerConfig, folder: Path) -> int:
    """Begin as a rank whose LoRA the follower adds twice; save the error that this ends with."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    modes = tuple(
        mode.model_copy(
            update={"lora": tuple(e.model_copy(update={"scale": 1.0 + rank}) for e in mode.lora)}
        )
        for mode in config.modes
    )
    config, device = config.model_copy(update={"modes": modes}), pick_device("cpu", threads=1)
    try:
        with join(device) as ranks:
            if rank > 0:
                load_follower(config, ranks)
            else:
                load_engine(config, device, ranks)
    except StartError as error:
        (folder / f"{rank}.txt").write_text(f"{type(error).__name__}: {error}")
    return 0


def run_ranks(world: int, run: Callable[[int], int]) -> list[int]:
    """Fork `world` ranks and wait for them; return their exit statuses."""
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
                status = run(rank)
            except BaseException:  # noqa: BLE001  # no fork may continue as its parent
                traceback.print_exc()
            os._exit(status)
        pids.append(pid)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def main() -> None:
    config, folder = load_config(Path(sys.argv[1])), Path(sys.argv[2])
    torch.set_num_threads(1)
    for world in (1, *WORLD_SIZES):
        own = folder / str(world)
        own.mkdir()
        statuses = run_ranks(world, lambda rank: run_rank(rank, world, config, own))  # noqa: B023
        (own / "statuses.json").write_text(json.dumps(statuses))
    differing = folder / "differing"
    differing.mkdir()
    run_ranks(2, lambda rank: run_differing(rank, config, differing))


if __name__ == "__main__":
    main()
