"""Modes whose recipes differ in attention only share all weights, and compute what each does alone.

The kernels hold weights in forms of their own, so what they hold has to be shared as well.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import quant
from quant.calibration.sampling import load_pipeline
from tests.quant.conftest import PROMPTS, save_tiny_model, tiny_recipe_dict
from tests.support.job_controls import IgnoringControl
from tests.support.requests import OWNER, generation_request
from worker.config import WorkerConfig, load_config
from worker.device import Device
from worker.engine.wan_engine import WanEngine
from worker.model_loader.loader import load_modes
from worker.model_loader.memory_plan import measure_model
from worker.model_loader.mode_plan import fingerprint_model, plan_modes
from worker.startup import load_engine

MODEL = """
[model]
name = "tiny"
path = "tiny"
sizes = ["32x32"]
default_size = "32x32"
min_frames = 1
max_frames = 5
default_frames = 5
fps = 8
max_steps = 4
default_steps = 2
default_guidance_scale = 3.0
default_mode = "{default}"
max_prompt_chars = 100
text_tokens = 16
"""
SPARSE = {"share_of_mass": 0.5, "tile": [1, 2, 2], "every_steps": 1, "dense_steps": 0}
ATTENTIONS = ("dense", "sparse", "fp8")
"""Modes by their recipes' attention."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with scales of FP8 attention, and a packed checkpoint made with them."""
    folder = tmp_path_factory.mktemp("shared")
    model = save_tiny_model(folder / "tiny")
    dense = tiny_recipe_dict()
    changes: dict[str, dict[str, object]] = {
        "dense": {},
        "sparse": {"attention": "sparse", "sparse": SPARSE},
        "fp8": {"attention": "fp8"},
    }
    for name, change in changes.items():
        (folder / f"{name}.json").write_text(json.dumps(dense | change))
    recipe = quant.QuantRecipe.load(str(folder / "fp8.json"))
    plan = quant.CalibrationPlan(
        model_fingerprint=quant.model_fingerprint(model),
        recipe=recipe,
        prompts=quant.PromptSet(PROMPTS[:8], "prompts.txt"),
        sampler=quant.SamplerSettings((32, 32), 1, 1, 3.0, 16, timestep_groups=1),
    )
    scales = quant.run_calibration(load_pipeline(model, "cpu"), plan)
    quant.save_scales(scales, folder / "scales.safetensors")
    quant.convert(model, recipe, folder / "scales.safetensors", folder / "packed")
    return folder


def configured(folder: Path, source: str, *attentions: str) -> WorkerConfig:
    """Write a configuration whose quantized modes all name the same scales or packed checkpoint."""
    text = MODEL.format(default=attentions[0])
    for name in attentions:
        text += f'\n[[modes]]\nname = "{name}"\ndescription = "d"\n'
        if name != "bf16":
            text += f'recipe = "{name}.json"\n{source}\n'
    (folder / "worker.toml").write_text(text)
    return load_config(folder / "worker.toml")


SOURCES = ('scales = "scales.safetensors"', 'packed = "packed"')


def frames(engine: WanEngine, mode: str) -> np.ndarray:
    request = generation_request(
        model="tiny", prompt="a red a", size="32x32", num_frames=5, num_inference_steps=2, mode=mode
    )
    return np.stack(list(engine.generate(request, IgnoringControl(), OWNER).frames))


@pytest.mark.parametrize("source", SOURCES)
def test_all_weights_are_shared_and_frames_are_those_of_each_alone(
    folder: Path, device: Device, source: str
) -> None:
    together = load_engine(configured(folder, source, *ATTENTIONS), device)
    transformers = [together.loaded[name].transformer for name in ATTENTIONS]
    first, *others = (
        {name: each.data_ptr() for name, each in transformer.state_dict(keep_vars=True).items()}
        for transformer in transformers
    )
    assert all(other == first for other in others)
    alone = {name: load_engine(configured(folder, source, name), device) for name in ATTENTIONS}
    assert quant.weight_bytes(*transformers) == alone["dense"].loaded["dense"].weight_bytes
    expected = {name: frames(engine, name) for name, engine in alone.items()}
    for name in (*ATTENTIONS, *reversed(ATTENTIONS)):  # what one keeps must not reach another
        assert np.array_equal(frames(together, name), expected[name]), name
    assert not np.array_equal(expected["dense"], expected["fp8"])
    assert not np.array_equal(expected["dense"], expected["sparse"])
    fingerprints = {mode.recipe_fingerprint for mode in together.modes}
    assert len(fingerprints) == len(ATTENTIONS)
    described = "\n".join(together.describe())
    assert "mode sparse: all weights shared with mode dense" in described


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("first", ["bf16", "sparse"])
def test_the_plan_counts_shared_weights_once(
    folder: Path, device: Device, source: str, first: str
) -> None:
    config = configured(folder, source, first, "fp8", "dense")
    plans = plan_modes(config, fingerprint_model(config))
    loaded = load_modes(config.model.path, plans, device)
    planned = measure_model(config, [plan.recipe for plan in plans], device)
    assert planned.transformer == quant.weight_bytes(*(mode.transformer for mode in loaded))
    assert planned.transformer_loading >= planned.transformer
    assert [mode.offer.name for mode in loaded] == [first, "fp8", "dense"]


def test_decoded_weights_are_shared_too(folder: Path, device: Device) -> None:
    config = configured(folder, SOURCES[0], "dense", "sparse")
    plans = plan_modes(config, fingerprint_model(config))
    dense, sparse = load_modes(config.model.path, plans, device, weight_storage="bf16_grid")
    assert quant.weight_bytes(dense.transformer, sparse.transformer) == dense.weight_bytes
    planned = measure_model(config, [plan.recipe for plan in plans], device)
    assert planned.transformer + planned.decoded_extra == dense.weight_bytes
