"""Fabricate one miniature and its scales for all tests of benchmarks."""

from pathlib import Path

import pytest
import torch

from benchmarks.fixtures.fabricate import Plan, calibrate_briefly, fabricate
from quant import QuantRecipe

SEED = 7


@pytest.fixture(scope="session")
def fabricated(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("fabricated") / "mini"
    fabricate(out, Plan("mini", 40, SEED, 2, torch.device("cpu"), shard_bytes=400_000))
    return out


@pytest.fixture(scope="session")
def fabricated_scales(fabricated) -> Path:
    out = fabricated.parent / "scales.safetensors"
    calibrate_briefly(fabricated, "mini", QuantRecipe.load("boundary-hif8"), out, "cpu")
    return out
