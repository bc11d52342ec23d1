"""Provide the miniature, and scales calibrated for its weights, to tests of the real engine."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline

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
from tests.worker.edited_model import EditedModel
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
    """The shipped configuration of the miniature, with these scales."""
    folder = tmp_path_factory.mktemp("config")
    save_scales(scales, folder / "scales.safetensors")
    text = (ROOT / "deploy" / "wan-mini.toml").read_text(encoding="utf-8")
    assert SHIPPED_SCALES in text, "the shipped configuration names its scales differently now"
    text = text.replace(SHIPPED_SCALES, '"scales.safetensors"')
    text = text.replace('"../models/wan-mini"', f'"{model_folder}"')
    path = folder / "worker.toml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def config(config_file: Path) -> WorkerConfig:
    return load_config(config_file)


@pytest.fixture
def edited(config: WorkerConfig, tmp_path: Path) -> EditedModel:
    """A copy of the miniature that a test may change."""
    return EditedModel(config, tmp_path / "model")


@pytest.fixture(scope="session")
def engine(config: WorkerConfig, device: Device) -> WanEngine:
    """The miniature in both modes."""
    return load_engine(config, device)
