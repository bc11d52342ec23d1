"""A mode whose FP8 attention begins after some steps: its frames, and what it is refused with."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from quant import QuantRecipe, Scales
from tests.support.job_controls import IgnoringControl
from tests.support.requests import OWNER, generation_request
from worker.config import FirstBlockCache, WorkerConfig
from worker.device import Device
from worker.engine.combinations import check_combinations
from worker.engine.wan_engine import WanEngine
from worker.errors import ConfigError
from worker.model_loader.loader import load_modes
from worker.model_loader.mode_plan import plan_modes


def with_bf16_steps(config: WorkerConfig, steps: int, folder: Path) -> WorkerConfig:
    """Return a configuration whose recipe keeps first steps in BF16, under the same scales."""
    recipe = QuantRecipe.load("boundary-hif8-fp8attn").to_dict()
    path = folder / f"{steps}.json"
    path.write_text(json.dumps(recipe | {"attention_bf16_steps": steps}))
    mode = config.modes[0].model_copy(update={"recipe": str(path)})
    return config.model_copy(update={"modes": (mode,)})


def frames(engine: WanEngine, steps: int) -> np.ndarray:
    request = generation_request(mode="w8a8", num_frames=1, num_inference_steps=steps)
    return np.stack(list(engine.generate(request, IgnoringControl(), OWNER).frames))


def test_jobs_attend_in_bf16_first_and_each_job_begins_anew(
    fp8_config: WorkerConfig, scales: Scales, engine: WanEngine, device: Device, tmp_path: Path
) -> None:
    def build(steps: int) -> WanEngine:
        config = with_bf16_steps(fp8_config, steps, tmp_path)
        modes = load_modes(config.model.path, plan_modes(config, scales.model_fingerprint), device)
        return WanEngine(config.model, "fingerprint", device, engine.components, modes)

    always, later = build(0), build(1)
    assert "mode w8a8: self-attention in BF16 in the first 1 steps" in later.describe()
    assert "self-attention" not in always.describe()
    assert later.modes[0].recipe_fingerprint != always.modes[0].recipe_fingerprint
    assert later.modes[0].min_steps == always.modes[0].min_steps
    without = frames(engine, 1)
    assert not np.array_equal(frames(always, 1), without)
    for _ in range(2):
        assert np.array_equal(frames(later, 1), without)
    two = frames(later, 2)
    assert not np.array_equal(two, frames(engine, 2))
    assert not np.array_equal(two, frames(always, 2))


def test_a_mode_of_which_no_step_would_be_in_fp8_is_refused(
    fp8_config: WorkerConfig, tmp_path: Path
) -> None:
    default = fp8_config.model.default_steps
    config = with_bf16_steps(fp8_config, default - 1, tmp_path)
    cached = FirstBlockCache(method="first_block", threshold=0.1)
    mode = config.modes[0].model_copy(update={"step_cache": cached})
    check_combinations(config, ranks=2)
    check_combinations(config.model_copy(update={"modes": (mode,)}))
    message = f"fp8 attention after the first {default} steps, .* lower attention_bf16_steps in"
    with pytest.raises(ConfigError, match=message):
        check_combinations(with_bf16_steps(fp8_config, default, tmp_path))
