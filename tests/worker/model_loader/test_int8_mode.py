"""A worker serves the miniature in INT8 beside BF16, with the scales that are shipped."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from quant import QuantRecipe, convert
from tests.support.job_controls import IgnoringControl
from tests.support.requests import OWNER, generation_request
from worker.config import ModeConfig, WorkerConfig
from worker.device import Device
from worker.engine.wan_engine import WanEngine
from worker.interface import ActShares
from worker.startup import load_engine

DESCRIPTION = "Weights and activations in INT8."


@pytest.fixture(scope="module")
def int8_mode(model_folder: Path) -> ModeConfig:
    return ModeConfig(
        name="int8",
        description=DESCRIPTION,
        recipe="boundary-int8",
        scales=model_folder / "scales" / "boundary-int8.safetensors",
    )


def with_modes(config: WorkerConfig, *modes: ModeConfig) -> WorkerConfig:
    model = config.model.model_copy(update={"default_mode": modes[-1].name})
    return config.model_copy(update={"modes": modes, "model": model})


def generate(engine: WanEngine, mode: str) -> tuple[np.ndarray, ActShares | None]:
    request = generation_request(mode=mode, num_frames=1, num_inference_steps=2, seed=7)
    clip = engine.generate(request, IgnoringControl(), OWNER)
    return np.stack(list(clip.frames)), clip.act_shares


def test_int8_is_served_beside_bf16_and_packed_it_makes_the_same_frames(
    config: WorkerConfig, int8_mode: ModeConfig, device: Device, tmp_path: Path
) -> None:
    engine = load_engine(with_modes(config, config.modes[0], int8_mode), device)
    offer = engine.modes[1]
    recipe = QuantRecipe.load("boundary-int8")
    assert (offer.name, offer.description) == ("int8", DESCRIPTION)
    assert offer.recipe_fingerprint == recipe.fingerprint
    assert offer.warning is None
    described = "\n".join(engine.describe())
    assert "315 linears in 35 of 40 blocks quantized" in described
    bf16, _ = generate(engine, "bf16")
    int8, shares = generate(engine, "int8")
    assert shares is not None
    assert shares.saturated == 0  # each token's scale fits its largest value
    assert 0 < shares.flushed < 0.1
    error = np.square(bf16.astype(float) - int8.astype(float)).mean()
    assert error > 0
    assert 10 * np.log10(255**2 / error) > 25  # of the same seed, after two steps

    assert int8_mode.scales is not None
    convert(config.model.path, recipe, int8_mode.scales, tmp_path / "packed")
    packed = int8_mode.model_copy(update={"scales": None, "packed": tmp_path / "packed"})
    alone = load_engine(with_modes(config, packed), device)
    assert np.array_equal(generate(alone, "int8")[0], int8)
    assert "315 linears quantized" in "\n".join(alone.describe())
