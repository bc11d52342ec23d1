"""Test what step caches skip, and that nothing of a job is left for the next one."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel

from benchmarks.fixtures.fused_transformer import fused_transformer
from jobs.errors import GenerationCancelled
from jobs.record import Stage
from quant import Scales
from quant.kernels.eager import EagerKernels
from tests.support.requests import OWNER, generation_request
from worker.config import FirstBlockCache, MagCache, StepCache, WorkerConfig, load_config
from worker.device import Device
from worker.engine.wan_engine import WanEngine
from worker.errors import ConfigError
from worker.interface import Clip, PreviewClip
from worker.model_loader.loader import Mode

STEPS = 5
SHORT: dict[str, Any] = {"num_frames": 1, "num_inference_steps": STEPS}
NEVER = FirstBlockCache(method="first_block", threshold=1e-9)
ALWAYS = FirstBlockCache(method="first_block", threshold=1e9)
# With these, some steps of the short job are skipped and some are not.
SOME: dict[str, StepCache] = {
    "first_block": FirstBlockCache(method="first_block", threshold=0.5),
    "mag": MagCache(method="mag", threshold=0.5, mag_ratios=(1.0, 0.9), max_skipped_steps=1),
}


class StoppingControl:
    """A control that stops the job at a denoising step, if one is given."""

    def __init__(self, stop_at: int | None = None) -> None:
        self._stop_at = stop_at

    def progress(self, stage: Stage, step: int, steps: int) -> None:
        if stage is Stage.DENOISE and step == self._stop_at:
            raise GenerationCancelled("the test said so")

    def check(self) -> None:
        pass

    def preview(self, step: int, steps: int, make: Callable[[], PreviewClip]) -> None:
        pass


def run(engine: WanEngine, **changes: object) -> tuple[Clip, np.ndarray]:
    clip = engine.generate(generation_request(**SHORT | changes), StoppingControl(), OWNER)
    return clip, np.stack(list(clip.frames))


def frames(engine: WanEngine, **changes: object) -> np.ndarray:
    return run(engine, **changes)[1]


@pytest.fixture(scope="module")
def fused(model_folder: Path, scales: Scales) -> dict[str, WanTransformer3DModel]:
    source = WanTransformer3DModel.from_pretrained(
        model_folder / "transformer", dtype=torch.bfloat16
    ).eval()
    kernels = EagerKernels()
    quantized = fused_transformer(source, kernels, scales.recipe, scales)
    return {"bf16": fused_transformer(source, kernels), "w8a8": quantized}


@pytest.fixture(scope="module")
def with_cache(engine: WanEngine, config: WorkerConfig, device: Device) -> Callable[..., WanEngine]:
    """Build an engine of the miniature with a step cache in every mode, or other transformers."""

    def build(
        cache: StepCache | None, transformers: dict[str, WanTransformer3DModel] | None = None
    ) -> WanEngine:
        def cached(name: str, mode: Mode) -> Mode:
            transformer = transformers[name] if transformers else mode.transformer
            return replace(mode, transformer=transformer, step_cache=cache)

        modes = tuple(cached(name, mode) for name, mode in engine.loaded.items())
        return WanEngine(config.model, "fingerprint", device, engine.components, modes)

    return build


@contextmanager
def counted(engine: WanEngine, mode: str = "bf16") -> Iterator[list[int]]:
    """Count the runs of the blocks after the first, as the length of a list."""
    calls: list[int] = []
    block = engine.loaded[mode].transformer.blocks[20]
    inner = getattr(block, "attn1", None) or block.qkv
    handle = inner.register_forward_hook(lambda *_: calls.append(1))
    try:
        yield calls
    finally:
        handle.remove()


def test_a_cache_that_never_holds_changes_no_bit(
    engine: WanEngine, with_cache: Callable[..., WanEngine]
) -> None:
    assert np.array_equal(frames(with_cache(NEVER)), frames(engine))


def test_a_cache_that_always_holds_runs_all_blocks_once_for_each_prompt(
    engine: WanEngine, with_cache: Callable[..., WanEngine]
) -> None:
    cached = with_cache(ALWAYS)
    for guidance, passes in ((3.0, 2), (1.0, 1)):
        with counted(cached) as calls:
            frames(cached, guidance_scale=guidance)
        assert len(calls) == passes
    with counted(engine) as calls:
        frames(engine)
    assert len(calls) == 2 * STEPS


@pytest.mark.parametrize("method", SOME)
@pytest.mark.parametrize("mode", ["bf16", "w8a8"])
def test_some_steps_are_skipped_and_fused_blocks_give_the_same_bits(
    with_cache: Callable[..., WanEngine],
    fused: dict[str, WanTransformer3DModel],
    method: str,
    mode: str,
) -> None:
    unfused = with_cache(SOME[method])
    with counted(unfused, mode) as calls:
        expected = frames(unfused, mode=mode)
    assert 2 < len(calls) < 2 * STEPS
    assert np.array_equal(frames(with_cache(SOME[method], fused), mode=mode), expected)


@pytest.mark.parametrize("method", SOME)
def test_a_job_after_a_cancelled_one_is_as_if_it_were_the_first(
    with_cache: Callable[..., WanEngine], method: str
) -> None:
    fresh = frames(with_cache(SOME[method]))
    used = with_cache(SOME[method])
    with pytest.raises(GenerationCancelled):
        used.generate(
            generation_request(**SHORT | {"prompt": "a blue ring", "seed": 3}),
            StoppingControl(STEPS - 1),
            OWNER,
        )
    assert np.array_equal(frames(used), fresh)
    frames(used, seed=4, num_inference_steps=2)
    assert np.array_equal(frames(used), fresh)


@pytest.mark.parametrize("method", SOME)
def test_a_cancelled_job_leaves_no_residuals_to_the_collector(
    engine: WanEngine, with_cache: Callable[..., WanEngine], method: str
) -> None:
    cached = with_cache(SOME[method])
    block = engine.loaded["bf16"].transformer.blocks[0]
    shapes: list[torch.Size] = []
    handle = block.register_forward_hook(lambda _block, _args, out: shapes.append(out.shape))
    gc.collect()
    gc.disable()
    try:
        with pytest.raises(GenerationCancelled):
            cached.generate(generation_request(**SHORT), StoppingControl(STEPS - 1), OWNER)
        left = [each for each in gc.get_objects() if type(each) is torch.Tensor]
        assert not [each for each in left if each.shape == shapes[0]]
    finally:
        gc.enable()
        handle.remove()


def test_nothing_stays_on_a_transformer_that_another_mode_shares(
    engine: WanEngine, with_cache: Callable[..., WanEngine]
) -> None:
    before = frames(engine)
    cached = with_cache(ALWAYS)
    with pytest.raises(GenerationCancelled):
        cached.generate(generation_request(**SHORT), StoppingControl(2), OWNER)
    assert not engine.loaded["bf16"].transformer.is_cache_enabled
    assert np.array_equal(frames(engine), before)


def test_activations_are_sampled_in_a_step_that_computes_them(
    with_cache: Callable[..., WanEngine], fused: dict[str, WanTransformer3DModel]
) -> None:
    some, _ = run(with_cache(SOME["mag"], fused), mode="w8a8")
    assert some.act_shares is not None
    none, _ = run(with_cache(ALWAYS, fused), mode="w8a8")
    assert none.act_shares is None
    kernels = {type(block.kernels) for block in fused["w8a8"].blocks}
    assert kernels == {EagerKernels}


CONFIGURED = {
    'method = "first_block"\nthreshold = 0.1': FirstBlockCache(method="first_block", threshold=0.1),
    'method = "mag"\nthreshold = 0.06\nmag_ratios = [1.0, 0.98]\nkept_share = 0.3': MagCache(
        method="mag", threshold=0.06, mag_ratios=(1.0, 0.98), kept_share=0.3
    ),
}


@pytest.mark.parametrize("text", CONFIGURED)
def test_it_is_configured_by_mode(config_file: Path, tmp_path: Path, text: str) -> None:
    path = tmp_path / "worker.toml"
    path.write_text(f"{config_file.read_text()}\n[modes.step_cache]\n{text}\n", encoding="utf-8")
    bf16, quantized = load_config(path).modes
    assert bf16.step_cache is None
    assert quantized.step_cache == CONFIGURED[text]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('method = "tea"\nthreshold = 0.1', "'first_block', 'mag'"),
        ('method = "first_block"', "threshold: Field required"),
        ('method = "first_block"\nthreshold = 0', "threshold: Input should be greater than 0"),
        ('method = "mag"\nthreshold = 0.06', "mag_ratios: Field required"),
        ('method = "mag"\nthreshold = 0.06\nmag_ratios = [1.0, 0.0]', "mag_ratios.1: Input"),
        ('method = "first_block"\nthreshold = 0.1\nmag_ratios = [1.0]', "mag_ratios: Extra"),
    ],
)
def test_a_fault_in_it_is_named(config_file: Path, tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "worker.toml"
    path.write_text(f"{config_file.read_text()}\n[modes.step_cache]\n{text}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        load_config(path)
