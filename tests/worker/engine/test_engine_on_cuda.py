"""Test the engine on a GPU: `TRITON_INTERPRET=0 pytest -m cuda tests/worker/engine`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.job_controls import IgnoringControl
from tests.support.requests import OWNER, generation_request
from worker.config import FirstBlockCache, StepCache, WorkerConfig, load_config
from worker.device import Device, pick_device
from worker.engine.wan_engine import WanEngine
from worker.startup import load_engine

pytestmark = pytest.mark.cuda

CONFIG = Path(__file__).parents[3] / "deploy" / "wan-mini.toml"


@pytest.fixture(scope="module")
def device() -> Device:
    return pick_device("cuda")


@pytest.fixture(scope="module")
def engine(device) -> WanEngine:
    return load_engine(with_encoder("device"), device)


def with_encoder(placement: str) -> WorkerConfig:
    config = load_config(CONFIG)
    model = config.model.model_copy(update={"text_encoder": placement})
    return config.model_copy(update={"model": model, "modes": config.modes[:2]})


def encode(engine: WanEngine, prompt: str) -> Iterator[torch.Tensor]:
    for embedding in engine.prompts.encode(
        generation_request(prompt=prompt), IgnoringControl(), OWNER
    ):
        assert embedding is not None
        yield embedding


@pytest.mark.parametrize("placement", ["encode", "host"])
def test_the_text_encoder_gives_the_same_wherever_it_is(engine, device, placement):
    other = load_engine(with_encoder(placement), device)
    assert other.components.text_encoder_placement == placement
    # The second prompt is encoded after the encoder was offloaded.
    for prompt in ("a small red circle", "a large blue square"):
        assert {each.device.type for each in other.components.text_encoder.parameters()} == {"cpu"}
        for ours, theirs in zip(encode(other, prompt), encode(engine, prompt), strict=True):
            assert ours.device.type == "cuda"
            if placement == "encode":
                assert torch.equal(ours, theirs)
            else:  # another device's BF16
                error = (ours.float() - theirs.float()).norm() / theirs.float().norm()
                assert error < 0.02
        again = zip(encode(other, prompt), encode(other, prompt), strict=True)
        assert all(torch.equal(*pair) for pair in again)
    assert {each.device.type for each in other.prompts._cache.values()} == {"cpu"}


@pytest.mark.parametrize("mode", ["bf16", "w8a8"])
def test_a_job_gives_the_same_video_twice(engine, mode):
    request = generation_request(mode=mode, num_frames=5, num_inference_steps=2)
    first, second = (
        list(engine.generate(request, IgnoringControl(), OWNER).frames) for _ in range(2)
    )
    assert len(first) == 5
    assert np.stack(first).std() > 0
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("mode", ["bf16", "w8a8"])
def test_step_caches_hook_into_fused_blocks(engine, device, mode):
    request = generation_request(mode=mode, num_frames=5, num_inference_steps=4)
    without, never, always = (
        np.stack(
            list(
                cached(engine, device, mode, cache)
                .generate(request, IgnoringControl(), OWNER)
                .frames
            )
        )
        for cache in (None, first_block_cache(1e-9), first_block_cache(1e9))
    )
    assert np.array_equal(never, without)
    assert not np.array_equal(always, without)


def first_block_cache(threshold: float) -> FirstBlockCache:
    return FirstBlockCache(method="first_block", threshold=threshold)


def cached(engine: WanEngine, device: Device, mode: str, cache: StepCache | None) -> WanEngine:
    modes = (replace(engine.loaded[mode], step_cache=cache),)
    return WanEngine(load_config(CONFIG).model, "fingerprint", device, engine.components, modes)
