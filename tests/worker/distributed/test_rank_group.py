"""Test one job on several ranks: equal latents, a common end, and no process left."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from jobs.catalog import ModeOffer
from quant import QuantRecipe, model_fingerprint
from tests.support.torchrun_ranks import JOBS, LAST, WORLD_SIZES, faults_of
from worker.config import WorkerConfig
from worker.distributed.agreement import LoadedParts, check_same_kernels, check_same_plans
from worker.distributed.follower import lead_ranks
from worker.errors import EXIT_DEVICE_LOST, RanksDiffer
from worker.model_loader.loader import Mode
from worker.model_loader.mode_plan import plan_modes

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
    config = with_further_modes(config_file, fp8_config, folder)
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


def with_further_modes(config_file: Path, fp8_config: WorkerConfig, folder: Path) -> Path:
    """Write the configuration with three further modes.

    Attention is sparse in one from step one on, and in FP8 in another from step two on. The last is
    in BF16, with a LoRA and Euler's method.
    """
    sparse = QuantRecipe.load("boundary-hif8-mini-sparse").to_dict()
    sparse["sparse"] |= {"dense_steps": 0, "share_of_mass": 0.6}
    fp8 = QuantRecipe.load("boundary-hif8-fp8attn").to_dict() | {"attention_bf16_steps": 1}
    torch.manual_seed(3)
    factors = {
        f"transformer.blocks.{block}.{module}.lora_{part}.weight": torch.randn(size) / 8
        for block in (0, 39)
        for module in ("attn1.to_q", "attn1.to_out.0", "attn2.to_v")
        for part, size in (("A", (2, 128)), ("B", (128, 2)))
    }
    save_file(factors, folder / "lora.safetensors")
    scales = config_file.parent / "scales.safetensors"
    text = config_file.read_text(encoding="utf-8").replace('"scales.safetensors"', f'"{scales}"')
    modes = [{"name": "fast", "scheduler": "euler", "flow_shift": 5.0}]
    for name, recipe, own in (("sparse", sparse, scales), ("fp8", fp8, fp8_config.modes[0].scales)):
        path = folder / f"{name}.json"
        path.write_text(json.dumps(recipe))
        modes.insert(0, {"name": name, "recipe": str(path), "scales": str(own)})
    for mode in modes:
        lines = [f"{key} = {json.dumps(value)}" for key, value in mode.items()]
        text += "\n".join(["", "[[modes]]", 'description = "d"', *lines])
    text += f'\nlora = [{{ path = "{folder / "lora.safetensors"}" }}]\n'
    (folder / "worker.toml").write_text(text, encoding="utf-8")
    return folder / "worker.toml"


def latents(outputs: Path, world: int, name: str) -> np.ndarray:
    loaded: np.ndarray = np.load(outputs / str(world) / f"{name}.npy")
    return loaded


class OtherRanks:
    """A `RankGroup` whose ranks gather what they are made with, this one's own first."""

    def __init__(self, *others: object) -> None:
        self._others = others

    def all_gather(self, value: object) -> list[object]:
        return [value, *self._others]


def mode_on(kernels: str, warning: str | None = None) -> Mode:
    offer = ModeOffer(name="w8a8", description="d", kernels=kernels, warning=warning)
    return Mode(offer, cast(Any, "no transformer"), None, 0)


def test_ranks_on_different_kernels_are_refused() -> None:
    warning = "Its compiler is missing."
    fine, slow = ("w8a8", "cuda", None), ("w8a8", "eager", warning)
    check_same_kernels(cast(Any, OtherRanks([fine])), [mode_on("cuda")])
    # The leader's offer has the warning.
    check_same_kernels(cast(Any, OtherRanks([slow])), [mode_on("eager", warning)])
    for others, own in (
        (([fine], [slow]), mode_on("cuda")),
        (([fine],), mode_on("eager", warning)),
    ):
        with pytest.raises(RanksDiffer, match=r"'w8a8' runs on .* Its compiler is missing\. Give"):
            check_same_kernels(cast(Any, OtherRanks(*others)), [own])


def test_ranks_are_compared_before_they_exchange_anything() -> None:
    ranks = OtherRanks([("w8a8", "eager", "A compiler is missing.")])
    with pytest.raises(RanksDiffer, match="on eager kernels on rank 1 and on cuda on rank 0"):
        lead_ranks(cast(Any, ranks), [mode_on("cuda")])


def test_ranks_with_other_files_or_settings_are_refused(
    config: WorkerConfig, tmp_path: Path
) -> None:
    plans = plan_modes(config, model_fingerprint(config.model.path))
    own = [LoadedParts.of(plan) for plan in plans]
    assert [each.mode for each in own] == ["bf16", "w8a8"]
    check_same_plans(cast(Any, OtherRanks(own)), plans)
    with pytest.raises(RanksDiffer, match="Rank 1 has the modes bf16 and rank 0 bf16, w8a8: give"):
        check_same_plans(cast(Any, OtherRanks(own[:1])), plans)
    changes = {
        "LoRAs": "has the LoRAs 0123456789ab .there. on rank 2 and no LoRAs on rank 0: give every",
        "recipe": r"has the recipe 0123456789ab .there. on rank 2 and the recipe \w{12} .bound",
        "scales": r"has the scales 0123456789ab .there. on rank 2 and the scales \w{12} .*safet",
        "settings": "has the settings flow_shift:832x480=3 on rank 2 and no settings on rank 0",
    }
    found = dict.fromkeys(changes, ("0123456789abcdef", "there"))
    found["settings"] = ("flow_shift:832x480=3", "")
    for part, message in changes.items():
        changed = own[1].parts | {part: found[part]}
        other = [own[0], LoadedParts("w8a8", changed)]
        with pytest.raises(RanksDiffer, match=f"Mode 'w8a8' {message}"):
            check_same_plans(cast(Any, OtherRanks(own, other)), plans)


def test_a_rank_whose_lora_differs_is_refused_before_weights_are_read(outputs: Path) -> None:
    for rank in (0, 1):
        text = (outputs / "differing" / f"{rank}.txt").read_text()
        lora = re.escape(str(outputs / "lora.safetensors"))
        found = rf"RanksDiffer: Mode 'fast' has the LoRAs \w+ \({lora}:2.0\) on rank 1 and the "
        assert re.match(rf"{found}LoRAs \w+ \({lora}\) on rank 0: give every rank", text), text


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
