"""Test modes from packed checkpoints: the same frames, fewer tensors, early refusals."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jobs.spec import GenerationRequest
from quant import PackedMismatch, QuantRecipe, WeightsError, convert, weight_bytes
from quant.transformer import wan_block
from quant.weights import header, reader
from quant.weights.transfer import ThreadTransfer
from tests.support.job_controls import IgnoringControl
from tests.support.requests import OWNER
from worker.config import ModeConfig, WorkerConfig, load_config
from worker.device import Device
from worker.engine.wan_engine import WanEngine
from worker.errors import ConfigError, ModelUnusable
from worker.model_loader.loader import load_modes
from worker.model_loader.mode_plan import fingerprint_model, plan_modes
from worker.startup import load_engine


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory, config: WorkerConfig) -> Path:
    """The packed checkpoint of the configured quantized mode."""
    mode = config.modes[1]
    assert mode.recipe is not None
    assert mode.scales is not None
    out = tmp_path_factory.mktemp("packed") / "w8a8"
    convert(config.model.path, QuantRecipe.load(mode.recipe), mode.scales, out)
    return out


@pytest.fixture
def packed_config(config: WorkerConfig, packed: Path) -> WorkerConfig:
    quantized = config.modes[1].model_copy(update={"scales": None, "packed": packed})
    return config.model_copy(update={"modes": (config.modes[0], quantized)})


def alone(config: WorkerConfig) -> WorkerConfig:
    return config.model_copy(update={"modes": config.modes[1:]})


def modes_of(config: WorkerConfig, device: Device):
    plans = plan_modes(config, fingerprint_model(config))
    return load_modes(config.model.path, plans, device)


def frames(engine: WanEngine) -> np.ndarray:
    request = GenerationRequest(
        prompt="a small red circle",
        negative_prompt="",
        mode="w8a8",
        size="96x96",
        num_frames=1,
        num_inference_steps=2,
        guidance_scale=4.0,
        seed=7,
        model="wan-mini",
    )
    return np.stack(list(engine.generate(request, IgnoringControl(), OWNER).frames))


def test_a_packed_worker_makes_the_same_frames(
    packed_config: WorkerConfig, engine: WanEngine, device: Device
) -> None:
    ours = load_engine(alone(packed_config), device)
    assert ours.model.fingerprint == engine.model.fingerprint
    assert ours.modes[0].recipe_fingerprint == engine.modes[1].recipe_fingerprint
    assert np.array_equal(frames(ours), frames(engine))
    assert "350 linears quantized" in "\n".join(ours.describe())


def test_beside_bf16_only_quantized_weights_are_added(
    packed_config: WorkerConfig, device: Device
) -> None:
    bf16, packed_mode = modes_of(packed_config, device)
    alone_mode = modes_of(alone(packed_config), device)[0]
    together = weight_bytes(bf16.transformer, packed_mode.transformer)
    assert bf16.weight_bytes < together < bf16.weight_bytes + alone_mode.weight_bytes
    codes = sum(t.nbytes for t in packed_mode.transformer.state_dict().values() if is_code(t))
    assert together == pytest.approx(bf16.weight_bytes + codes, rel=0.001)


def is_code(tensor: torch.Tensor) -> bool:
    return tensor.dtype is torch.uint8


def test_blocks_are_fused_while_others_are_still_read(
    packed_config: WorkerConfig, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    emulated = packed_config.modes[1].model_copy(update={"exact_emulation": True})
    config = packed_config.model_copy(update={"modes": (emulated,)})
    expected = frames(load_engine(config, device))
    events: list[str] = []

    class Slow(ThreadTransfer):
        def finish(self, begun: Any) -> None:
            time.sleep(0.001)
            super().finish(begun)
            events.append("read")

    class RecordingBlock(wan_block.FusedWanBlock):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            events.append("fused")

    monkeypatch.setattr(header, "SMALL_BYTES", 1)  # each tensor is read by itself
    monkeypatch.setattr(reader, "fastest_transfer", Slow)
    monkeypatch.setattr(wan_block, "FusedWanBlock", RecordingBlock)
    assert np.array_equal(frames(load_engine(config, device)), expected)
    assert events.count("fused") == 40
    assert "read" in events[events.index("fused") :]


def test_packed_alone_needs_no_other_transformer(
    packed_config: WorkerConfig, device: Device, tmp_path: Path
) -> None:
    path = packed_config.model.path
    ignored = shutil.ignore_patterns("diffusion_pytorch_model.safetensors", "*.png", "scales")
    folder = Path(shutil.copytree(path, tmp_path / "model", ignore=ignored))
    shutil.copytree(path / "vae", folder / "vae", dirs_exist_ok=True)
    model = packed_config.model.model_copy(update={"path": folder})
    config = packed_config.model_copy(update={"model": model})
    engine = load_engine(alone(config), device)
    assert engine.model.fingerprint == fingerprint_model(packed_config)
    assert frames(engine).shape == (1, 96, 96, 3)

    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelUnusable, match=r"are not those that .*packed beside"):
        load_engine(alone(config), device)


def test_another_recipe_is_refused_before_anything_is_loaded(
    packed_config: WorkerConfig, tmp_path: Path
) -> None:
    recipe = replace(QuantRecipe.load("boundary-hif8"), name="other", protected_blocks=(0,))
    (tmp_path / "other.json").write_text(recipe.to_json(), encoding="utf-8")
    mode = packed_config.modes[1].model_copy(update={"recipe": str(tmp_path / "other.json")})
    config = packed_config.model_copy(update={"modes": (mode,)})
    with pytest.raises(PackedMismatch, match=r"'other'.*-m quant convert"):
        plan_modes(config, fingerprint_model(config))


def test_another_model_is_refused_before_anything_is_loaded(packed_config: WorkerConfig) -> None:
    with pytest.raises(PackedMismatch, match=r"this model is sha256-full-v2:00.*quant convert"):
        plan_modes(packed_config, "sha256-full-v2:00")


def test_a_missing_checkpoint_is_refused_with_the_command(
    packed_config: WorkerConfig, tmp_path: Path
) -> None:
    mode = packed_config.modes[1].model_copy(update={"packed": tmp_path})
    config = packed_config.model_copy(update={"modes": (packed_config.modes[0], mode)})
    with pytest.raises(WeightsError, match=r"not a packed checkpoint.*-m quant convert"):
        plan_modes(config, fingerprint_model(config))


def test_the_path_of_a_packed_checkpoint_is_relative_to_the_file(
    config_file: Path, tmp_path: Path
) -> None:
    text = config_file.read_text(encoding="utf-8")
    file = tmp_path / "worker.toml"
    file.write_text(text.replace('scales = "scales.safetensors"', 'packed = "w8a8"'))
    assert load_config(file).modes[1].packed == (tmp_path / "w8a8").resolve()
    file.write_text(text + 'packed = "w8a8"\n')
    with pytest.raises(ConfigError, match="both scales and a packed checkpoint"):
        load_config(file)
    with pytest.raises(ValueError, match="needs both recipe and scales"):
        ModeConfig.model_validate({"name": "m", "description": "d", "packed": "p"})
