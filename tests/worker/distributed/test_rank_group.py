"""Test one job on several ranks: equal latents, a common end, and no process left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from jobs.catalog import ModeOffer
from quant import QuantRecipe
from tests.support.torchrun_ranks import JOBS, LAST, WORLD_SIZES, faults_of
from worker.config import WorkerConfig
from worker.distributed.follower import check_same_kernels, lead_ranks
from worker.errors import EXIT_DEVICE_LOST, RanksDiffer
from worker.model_loader.loader import Mode

ROOT = Path(__file__).resolve().parents[3]
EXPECTED_ERRORS = {
    "the leader is told to stop": "GenerationCancelled",
    "a follower's memory is full": "OutOfMemoryError",
    "the leader's memory is full": "MemoryError",
    "a follower fails": "RankFailed",
}


@pytest.fixture(scope="module")
def outputs(
    config_file: Path, fp8_config: WorkerConfig, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """The folder that `tests.support.torchrun_ranks` has filled; none of its processes is left."""
    folder = tmp_path_factory.mktemp("ranks")
    config = with_attention_modes(config_file, fp8_config, folder)
    command = [sys.executable, "-m", "tests.support.torchrun_ranks", str(config), str(folder)]
    environment = os.environ | {"OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "1"}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
        )
        try:
            assert process.wait(240) == 0, (folder / "log").read_text()
            yield folder
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def with_attention_modes(config_file: Path, fp8_config: WorkerConfig, folder: Path) -> Path:
    """Write the configuration with two further modes.

    Attention is sparse in one from step one on, and in FP8 in the other from step two on.
    """
    sparse = QuantRecipe.load("boundary-hif8-mini-sparse").to_dict()
    sparse["sparse"] |= {"dense_steps": 0, "share_of_mass": 0.6}
    fp8 = QuantRecipe.load("boundary-hif8-fp8attn").to_dict() | {"attention_bf16_steps": 1}
    scales = config_file.parent / "scales.safetensors"
    text = config_file.read_text(encoding="utf-8").replace('"scales.safetensors"', f'"{scales}"')
    lines = [text]
    for name, recipe, own in (("sparse", sparse, scales), ("fp8", fp8, fp8_config.modes[0].scales)):
        path = folder / f"{name}.json"
        path.write_text(json.dumps(recipe))
        mode = {"name": name, "description": "d", "recipe": str(path), "scales": str(own)}
        lines += ["[[modes]]", *(f"{key} = {json.dumps(value)}" for key, value in mode.items())]
    (folder / "worker.toml").write_text("\n".join(lines), encoding="utf-8")
    return folder / "worker.toml"


def latents(outputs: Path, world: int, name: str) -> np.ndarray:
    loaded: np.ndarray = np.load(outputs / str(world) / f"{name}.npy")
    return loaded


ModeKernels = tuple[str, str | None, str | None]


def test_ranks_on_different_kernels_are_refused() -> None:
    fine: ModeKernels = ("w8a8", "cuda", None)
    slow: ModeKernels = ("w8a8", "eager", "Its compiler is missing.")
    check_same_kernels([[fine], [fine]])
    check_same_kernels([[slow], [slow]])  # the leader's offer has the warning
    for modes_by_rank in ([[fine], [fine], [slow]], [[slow], [fine]]):
        with pytest.raises(RanksDiffer, match=r"'w8a8' runs on .* Its compiler is missing\. Give"):
            check_same_kernels(modes_by_rank)


class DifferentRanks:
    """A `RankGroup` whose other rank lacks a compiler."""

    def all_gather(self, value: list[ModeKernels]) -> list[list[ModeKernels]]:
        slow: list[ModeKernels] = [
            (name, "eager", "A compiler is missing.") for name, _, _ in value
        ]
        return [value, slow]


def test_ranks_are_compared_before_they_exchange_anything() -> None:
    offer = ModeOffer(name="w8a8", description="d", kernels="cuda")
    mode = Mode(offer, cast(Any, "no transformer"), None, 0)
    with pytest.raises(RanksDiffer, match="on eager kernels on rank 1 and on cuda on rank 0"):
        lead_ranks(cast(Any, DifferentRanks()), [mode])


@pytest.mark.parametrize("world", WORLD_SIZES)
@pytest.mark.parametrize("job", JOBS)
def test_the_latents_are_those_of_one_rank_to_the_last_bit(
    outputs: Path, world: int, job: str
) -> None:
    assert latents(outputs, 1, job).std() > 0.1
    assert np.array_equal(latents(outputs, world, job), latents(outputs, 1, job))


@pytest.mark.parametrize(
    ("world", "fault"), [(world, fault) for world in WORLD_SIZES for fault in faults_of(world)]
)
def test_a_job_ends_on_all_ranks_and_the_next_one_is_unaffected(
    outputs: Path, world: int, fault: str
) -> None:
    ended = json.loads((outputs / str(world) / "ended.json").read_text())
    assert ended[fault][:2] == [EXPECTED_ERRORS[fault], False]
    assert np.array_equal(latents(outputs, world, f"after {fault}"), latents(outputs, 1, "tiny"))


@pytest.mark.parametrize("world", WORLD_SIZES)
def test_a_rank_that_is_lost_takes_the_others_with_it(outputs: Path, world: int) -> None:
    ended = json.loads((outputs / str(world) / "ended.json").read_text())
    fault, how = LAST[world]
    name, is_lost, text = ended[fault]
    assert (name, is_lost) == ("RanksLost", True)
    statuses = json.loads((outputs / str(world) / "statuses.json").read_text())
    last = -signal.SIGKILL if how == "die" else EXIT_DEVICE_LOST
    assert statuses == [0, *[EXIT_DEVICE_LOST] * (world - 2), last]
    if how == "lost":
        assert f"rank {world - 1}: RuntimeError: npuSynchronizeDevice" in text
        assert "error code is 507899" in text
