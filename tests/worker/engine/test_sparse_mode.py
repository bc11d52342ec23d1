"""A mode with sparse attention: what it reports, what it shares, and what it is refused with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from jobs.errors import GenerationFailed
from quant import QuantRecipe, Scales, save_scales
from tests.support.job_controls import IgnoringControl
from tests.support.requests import OWNER, generation_request
from worker.config import FirstBlockCache, ModeConfig, WorkerConfig
from worker.device import Device
from worker.engine.combinations import check_combinations
from worker.engine.wan_engine import WanEngine
from worker.errors import ConfigError, ModelUnusable
from worker.model_loader.loader import load_modes
from worker.model_loader.mode_plan import choose_kernels, kernels_of, plan_modes
from worker.process.stats import WorkerStats

CACHE = FirstBlockCache(method="first_block", threshold=0.1)


@pytest.fixture
def sparse_config(config: WorkerConfig) -> WorkerConfig:
    """The quantized mode alone, with sparse attention and the scales of the dense recipe."""
    mode = config.modes[1].model_copy(update={"recipe": "boundary-hif8-mini-sparse"})
    return config.model_copy(update={"modes": (mode,)})


def with_mode(config: WorkerConfig, **changes: object) -> WorkerConfig:
    mode: ModeConfig = config.modes[0].model_copy(update=changes)
    return config.model_copy(update={"modes": (mode,)})


def test_a_job_says_what_its_attention_kept(
    sparse_config: WorkerConfig, scales: Scales, engine: WanEngine, device: Device
) -> None:
    plans = plan_modes(sparse_config, scales.model_fingerprint)
    modes = load_modes(sparse_config.model.path, plans, device)
    sparse = WanEngine(sparse_config.model, "fingerprint", device, engine.components, modes)
    assert "mode w8a8: sparse self-attention, 0.95 of the softmax" in sparse.describe()
    assert modes[0].offer.recipe_fingerprint != engine.modes[1].recipe_fingerprint
    stats, dense_steps = WorkerStats(), 4
    assert modes[0].offer.min_steps == dense_steps + 1
    request = generation_request(
        mode="w8a8", num_frames=5, num_inference_steps=dense_steps, guidance_scale=1.0
    )
    with pytest.raises(GenerationFailed, match="Mode w8a8 takes 5 to"):
        sparse.generate(request, IgnoringControl(), OWNER)
    request = request.model_copy(update={"num_inference_steps": dense_steps + 1})
    clip = sparse.generate(request, IgnoringControl(), OWNER)
    assert clip.attention_shares is not None
    assert 0.05 < clip.attention_shares.density < 0.95
    assert clip.attention_shares.density < clip.attention_shares.mass < 1
    stats.record_steps("w8a8", [0.1], None, clip.attention_shares)
    status = stats.modes()["w8a8"]
    assert status.attention_density == clip.attention_shares.density
    assert status.attention_mass == clip.attention_shares.mass
    stats.record_steps("w8a8", [0.1], None, None)  # as a proof of one step, which is dense
    assert stats.modes()["w8a8"].attention_density is None
    assert stats.modes()["w8a8"].attention_mass is None


def test_what_does_not_go_together_is_refused_by_name(
    config: WorkerConfig, sparse_config: WorkerConfig
) -> None:
    for each in (config, sparse_config):
        check_combinations(each)
        check_combinations(each, ranks=2)
    dense = config.model_copy(update={"modes": config.modes[1:]})
    cached = with_mode(dense, step_cache=CACHE)
    check_combinations(cached)
    with pytest.raises(ConfigError, match="'w8a8' has a step_cache and several devices, which do"):
        check_combinations(cached, ranks=2)
    with pytest.raises(ConfigError, match="'w8a8' has a step_cache and sparse attention, which do"):
        check_combinations(with_mode(sparse_config, step_cache=CACHE))


def test_a_mode_of_which_no_step_would_be_sparse_is_refused(
    sparse_config: WorkerConfig,
) -> None:
    few = sparse_config.model.model_copy(update={"default_steps": 4})
    of_few = sparse_config.model_copy(update={"model": few})
    with pytest.raises(ConfigError, match="after the first 4 steps, and its jobs have 4 by"):
        check_combinations(of_few)
    check_combinations(with_mode(of_few, default_steps=5))
    many = with_mode(sparse_config, default_steps=5, max_steps=5)
    check_combinations(many)
    for own in ({"default_steps": 4}, {"default_steps": 4, "max_steps": 4}):
        with pytest.raises(ConfigError, match="after the first 4 steps, and its jobs have 4 by"):
            check_combinations(with_mode(many, **own))


def test_an_npu_refuses_it_by_name(
    sparse_config: WorkerConfig, scales: Scales, device: Device
) -> None:
    npu = replace(device, kind="npu", name="Ascend")
    with pytest.raises(ModelUnusable, match="with sparse attention, which Ascend does not run"):
        choose_kernels(plan_modes(sparse_config, scales.model_fingerprint), npu)


def test_a_gpu_says_that_it_is_slower(
    sparse_config: WorkerConfig, scales: Scales, device: Device
) -> None:
    emulated = with_mode(sparse_config, exact_emulation=True)  # so that no GPU is asked for kernels
    (plan,) = plan_modes(emulated, scales.model_fingerprint)
    assert kernels_of(plan, device).warning is None
    warning = kernels_of(plan, replace(device, kind="cuda")).warning
    assert warning == ("Sparse attention is emulated in plain torch: slower than dense attention.")


def test_scales_may_be_of_either_recipe(
    sparse_config: WorkerConfig, scales: Scales, tmp_path: Path
) -> None:
    recipe = QuantRecipe.load("boundary-hif8-mini-sparse")
    save_scales(replace(scales, recipe=recipe), tmp_path / "of-sparse.safetensors")
    path = tmp_path / "of-sparse.safetensors"
    for changes in ({"scales": path}, {"scales": path, "recipe": "boundary-hif8"}):
        (plan,) = plan_modes(with_mode(sparse_config, **changes), scales.model_fingerprint)
        assert plan.recipe is not None
        assert plan.recipe.name == changes.get("recipe", recipe.name)
