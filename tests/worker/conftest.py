"""Provide the miniature, and scales calibrated for its weights, to tests of the real engine."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from quant import (
    CalibrationPlan,
    PromptSet,
    QuantRecipe,
    SamplerSettings,
    Scales,
    model_fingerprint,
    run_calibration,
    save_scales,
)
from tests.support.killable_valkey import KillableValkey
from worker.config import WorkerConfig, load_config
from worker.device import Device, pick_device
from worker.engine.wan_engine import WanEngine
from worker.startup import load_engine

ROOT = Path(__file__).resolve().parents[2]
SHIPPED_SCALES = '"../models/wan-mini/scales/boundary-hif8.safetensors"'


@pytest.fixture(autouse=True)
def unfrozen_gc() -> Iterator[None]:
    """Undo after each test what a start in this process did to the garbage collector."""
    yield
    gc.unfreeze()
    gc.enable()


@pytest.fixture
def killable_valkey(tmp_path: Path, unused_port: int) -> Iterator[KillableValkey]:
    """A Valkey for one test, which may kill it."""
    server = KillableValkey(tmp_path / "valkey", unused_port)
    yield server
    server.kill()


@pytest.fixture(scope="session")
def device() -> Device:
    # One thread: with other work on the machine, two threads would wait for each other.
    return pick_device("cpu", threads=1)


@pytest.fixture(scope="session")
def model_folder() -> Path:
    return ROOT / "models" / "wan-mini"


@pytest.fixture(scope="session")
def scales(model_folder: Path, device: Device) -> Scales:
    """Scales calibrated on the current weights, with as few runs as possible."""
    plan = CalibrationPlan(
        model_fingerprint=model_fingerprint(model_folder),
        recipe=QuantRecipe.load("boundary-hif8"),
        prompts=PromptSet(tuple(f"circle number {i}" for i in range(8)), "prompts.txt"),
        sampler=SamplerSettings(
            size=(96, 96),
            num_frames=1,
            num_inference_steps=1,
            timestep_groups=1,
            guidance_scale=3.0,
            text_tokens=64,
        ),
    )
    pipeline = WanPipeline.from_pretrained(model_folder, dtype=torch.bfloat16)
    return run_calibration(pipeline, plan)


@pytest.fixture(scope="session")
def config_file(
    tmp_path_factory: pytest.TempPathFactory, model_folder: Path, scales: Scales
) -> Path:
    """The shipped configuration of the miniature, with these scales and without its fast modes."""
    folder = tmp_path_factory.mktemp("config")
    save_scales(scales, folder / "scales.safetensors")
    shipped = (ROOT / "deploy" / "wan-mini.toml").read_text(encoding="utf-8")
    text, fast, _ = shipped.partition('[[modes]]\nname = "fast"')
    assert fast, "the shipped configuration orders its modes differently now"
    assert SHIPPED_SCALES in text, "the shipped configuration names its scales differently now"
    text = text.replace(SHIPPED_SCALES, '"scales.safetensors"')
    text = text.replace('"../models/wan-mini"', f'"{model_folder}"')
    path = folder / "worker.toml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def config(config_file: Path) -> WorkerConfig:
    return load_config(config_file)


@pytest.fixture(scope="session")
def fp8_config(
    config: WorkerConfig, scales: Scales, tmp_path_factory: pytest.TempPathFactory
) -> WorkerConfig:
    """The quantized mode alone, with FP8 attention under scales that are all 1."""
    recipe = QuantRecipe.load("boundary-hif8-fp8attn")
    fit = {name: torch.tensor(1.0) for name in recipe.attention_inputs}
    path = tmp_path_factory.mktemp("scales") / "fp8.safetensors"
    save_scales(replace(scales, recipe=recipe, attention_scale=fit), path)
    mode = config.modes[1].model_copy(update={"recipe": recipe.name, "scales": path})
    return config.model_copy(update={"modes": (mode,)})


class EditedModel:
    """A copy of a configuration's model folder that a test may change."""

    def __init__(self, config: WorkerConfig, folder: Path) -> None:
        self.folder = Path(shutil.copytree(config.model.path, folder))
        model = config.model.model_copy(update={"path": self.folder})
        self.config = config.model_copy(update={"model": model})

    def set(self, file: str, **values: object) -> None:
        """Set values in a JSON file."""
        path = self.folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | values), encoding="utf-8")

    def drop(self, file: str, *names: str) -> None:
        """Leave values out of a JSON file."""
        path = self.folder / file
        values = json.loads(path.read_text())
        left = {name: value for name, value in values.items() if name not in names}
        path.write_text(json.dumps(left), encoding="utf-8")

    def set_scheduler(self, name: str, **values: object) -> None:
        """Replace the scheduler by one of a class of diffusers with these settings."""
        self.set("model_index.json", scheduler=["diffusers", name])
        path = self.folder / "scheduler" / "scheduler_config.json"
        path.write_text(json.dumps({"_class_name": name} | values), encoding="utf-8")

    def change(self, part: str, name: str, change: Callable[[Tensor], Tensor]) -> None:
        """Replace a tensor of a part by what `change` makes of it."""
        (file,) = (self.folder / part).glob("*.safetensors")
        with safe_open(file, "pt") as opened:
            tensors = {each: opened.get_tensor(each) for each in opened.keys()}  # noqa: SIM118
            metadata = opened.metadata()
        tensors[name] = change(tensors[name])
        save_file(tensors, file, metadata)

    def set_number(self, part: str, name: str, value: float) -> None:
        """Set the first number of a tensor of a part."""

        def set_first(tensor: Tensor) -> Tensor:
            tensor.view(-1)[0] = value
            return tensor

        self.change(part, name, set_first)

    def with_modes(self, *names: str) -> WorkerConfig:
        """Return the configuration with these modes only."""
        modes = tuple(mode for mode in self.config.modes if mode.name in names)
        model = self.config.model.model_copy(update={"default_mode": names[0]})
        return self.config.model_copy(update={"modes": modes, "model": model})

    def with_model(self, **changes: object) -> WorkerConfig:
        """Return the configuration with changes to `[model]`."""
        model = self.config.model.model_copy(update=changes)
        return self.config.model_copy(update={"model": model})


@pytest.fixture
def edited(config: WorkerConfig, tmp_path: Path) -> EditedModel:
    """A copy of the miniature that a test may change."""
    return EditedModel(config, tmp_path / "model")


@pytest.fixture(scope="session")
def engine(config: WorkerConfig, device: Device) -> WanEngine:
    """The miniature in both modes."""
    return load_engine(config, device)
