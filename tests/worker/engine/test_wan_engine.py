"""Test the engine on the real classes: both modes to the last bit, and jobs stopped anywhere."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, WanPipeline

import quant
from jobs.errors import GenerationCancelled, GenerationFailed, PromptTooLong
from jobs.record import Stage
from tests.support.diffusers_reference import with_our_products
from tests.support.job_controls import RecordingControl, StopAtStep
from tests.support.requests import OWNER, generation_request, unique_prompt
from worker.config import WorkerConfig
from worker.device import Device
from worker.engine.denoiser import _noise
from worker.engine.wan_engine import WanEngine
from worker.interface import Frame
from worker.model_loader.components import ComponentLoader
from worker.model_loader.loader import load_modes
from worker.model_loader.mode_plan import plan_modes
from worker.startup import load_engine

# Short clips where the length does not matter: 5 frames are two latent ones.
SHORT: dict[str, Any] = {"num_frames": 5, "num_inference_steps": 1}


def frames(
    engine: WanEngine, control: RecordingControl | None = None, **changes: object
) -> np.ndarray:
    clip = engine.generate(generation_request(**changes), control or RecordingControl(), OWNER)
    taken: list[Frame] = list(clip.frames)
    assert len(taken) == clip.num_frames
    return np.stack(taken)


@pytest.fixture(scope="module")
def undisturbed(engine: WanEngine) -> np.ndarray:
    """The short clip in BF16, undisturbed."""
    return frames(engine, **SHORT)


def test_bf16_is_diffusers_own_pipeline_to_the_last_bit(
    engine: WanEngine, model_folder: Path
) -> None:
    vae = AutoencoderKLWan.from_pretrained(model_folder / "vae", dtype=torch.float32)
    pipeline = WanPipeline.from_pretrained(model_folder, vae=vae, dtype=torch.bfloat16)
    pipeline.set_progress_bar_config(disable=True)
    with_our_products(pipeline.transformer)
    request = generation_request()
    theirs = pipeline(
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        width=96,
        height=96,
        num_frames=17,
        num_inference_steps=4,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(7),
        max_sequence_length=64,
    ).frames[0]
    ours = frames(engine)
    assert ours.shape == (17, 96, 96, 3)
    assert np.array_equal(ours, (theirs * 255).round().astype(np.uint8))


def test_every_bit_of_a_seed_counts(engine: WanEngine, undisturbed: np.ndarray) -> None:
    """Torch's generator on the CPU takes the lower 32 bits: 7 and 2^32 + 7 would be one video."""
    found = [frames(engine, seed=seed, **SHORT) for seed in (2**32 + 7, 2**33 + 7, 2**63 - 1)]
    for index, one in enumerate([undisturbed, *found]):
        assert np.isfinite(one).all()
        for other in found[index:]:
            assert np.abs(one.astype(float) - other).mean() > 1
    assert np.array_equal(frames(engine, seed=2**32 + 7, **SHORT), found[0])


def test_the_noise_of_a_large_seed_is_normal_and_fixed(engine: WanEngine) -> None:
    request = generation_request(seed=2**32 + 7)
    latents = _noise(engine._pipelines["bf16"], request)["latents"]
    theirs = engine._pipelines["bf16"].prepare_latents(1, latents.shape[1], 96, 96, 17)
    assert latents.shape == theirs.shape
    assert abs(float(latents.mean())) < 0.05
    assert abs(float(latents.std()) - 1) < 0.05
    expected = np.random.RandomState([7, 1]).standard_normal(4)
    assert np.allclose(latents.flatten()[:4].numpy(), expected)


def test_latents_with_nan_fail_the_job(
    engine: WanEngine, undisturbed: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = torch.full_like(engine.loaded["bf16"].transformer.proj_out.weight, torch.nan)
    with monkeypatch.context() as patch:
        patch.setattr(engine.loaded["bf16"].transformer.proj_out.weight, "data", broken)
        with pytest.raises(GenerationFailed, match=r"mode bf16 gave (\d+) of \1 .* another mode"):
            frames(engine, **SHORT)
    assert np.array_equal(frames(engine, **SHORT), undisturbed)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("tiling", [False, True])
def test_frames_with_nan_or_infinite_values_fail_the_job(
    engine: WanEngine,
    undisturbed: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
    value: float,
    tiling: bool,
) -> None:
    """Infinite ones would be clamped to black or white, and NaN would become black."""
    bias = engine.components.vae.decoder.conv_out.bias
    with monkeypatch.context() as patch:
        patch.setattr(bias, "data", torch.tensor([value, 0.0, 0.0]))
        patch.setattr(engine, "components", replace(engine.components, vae_tiling=tiling))
        with pytest.raises(
            GenerationFailed, match=r"^The VAE gave \d+ of \d+ .* files are damaged"
        ):
            frames(engine, **SHORT)
    assert not any(m._forward_hooks for m in engine.components.vae.modules())
    assert np.array_equal(frames(engine, **SHORT), undisturbed)


def test_modes_do_not_disturb_each_other(engine: WanEngine, undisturbed: np.ndarray) -> None:
    quantized = frames(engine, mode="w8a8", **SHORT)
    assert np.array_equal(frames(engine, **SHORT), undisturbed)
    assert np.array_equal(frames(engine, mode="w8a8", **SHORT), quantized)
    assert not np.array_equal(undisturbed, quantized)


def test_quantized_frames_are_near_those_of_the_same_seed(
    engine: WanEngine, undisturbed: np.ndarray
) -> None:
    quantized = frames(engine, mode="w8a8", **SHORT).astype(float)
    other_seed = frames(engine, seed=8, **SHORT).astype(float)
    assert np.abs(quantized - undisturbed).mean() < np.abs(other_seed - undisturbed).mean() / 3


def test_without_guidance_the_negative_prompt_does_not_count(
    engine: WanEngine, undisturbed: np.ndarray
) -> None:
    free = frames(engine, guidance_scale=1.0, **SHORT)
    assert np.array_equal(free, frames(engine, guidance_scale=1.0, negative_prompt="blue", **SHORT))
    guided = frames(engine, negative_prompt="blue", **SHORT)
    assert not np.array_equal(guided, undisturbed)


def test_progress_is_reported_in_order(engine: WanEngine) -> None:
    control = RecordingControl()
    frames(engine, control, prompt=unique_prompt(), num_frames=9, num_inference_steps=3)
    assert control.seen == [
        (Stage.TEXT_ENCODER, 0, 1),
        *[(Stage.DENOISE, step, 3) for step in range(4)],
        *[(Stage.VAE, step, 3) for step in range(4)],
    ]


def test_seconds_are_counted_per_stage(engine: WanEngine) -> None:
    clip = engine.generate(
        generation_request(prompt=unique_prompt(), **SHORT), RecordingControl(), OWNER
    )
    assert clip.seconds.text_encoder_s > 0
    assert clip.seconds.denoise_s > 0
    assert clip.seconds.vae_s == 0
    list(clip.frames)
    assert clip.seconds.vae_s > 0


@pytest.mark.parametrize(
    "control",
    [
        pytest.param(RecordingControl((Stage.TEXT_ENCODER, 2)), id="between text encoder layers"),
        pytest.param(StopAtStep(Stage.DENOISE, 1), id="after a denoising step"),
        pytest.param(RecordingControl((Stage.VAE, 3)), id="inside the first latent frame"),
        pytest.param(StopAtStep(Stage.VAE, 1), id="between latent frames"),
    ],
)
def test_a_job_stops_at_any_point_and_the_next_one_is_unaffected(
    engine: WanEngine, control: RecordingControl, undisturbed: np.ndarray
) -> None:
    with pytest.raises(GenerationCancelled):
        frames(engine, control, prompt=unique_prompt(), **SHORT)
    assert np.array_equal(frames(engine, **SHORT), undisturbed)


def test_no_hooks_are_left(engine: WanEngine) -> None:
    with pytest.raises(GenerationCancelled):
        frames(engine, RecordingControl((Stage.VAE, 3)), **SHORT)
    clip = engine.generate(generation_request(**SHORT), RecordingControl(), OWNER)
    next(clip.frames)
    clip.frames.close()
    for part in (engine.components.vae, engine.components.text_encoder):
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in part.modules())


@pytest.mark.parametrize("field", ["prompt", "negative_prompt"])
def test_a_text_that_would_be_cut_is_refused(engine: WanEngine, field: str) -> None:
    fits = " ".join(["red"] * 63)
    assert len(engine.components.tokenizer.tokenize(fits).input_ids) == 64
    assert len(frames(engine, **{**SHORT, field: fits})) == 5
    with pytest.raises(PromptTooLong, match=f"{field} has 65 tokens, more than 64") as caught:
        frames(engine, **{**SHORT, field: fits + " red"})
    assert caught.value.context == {"field": field, "tokens": 65, "bound": 64}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "fp4"}, "not fp4 at 96x96"),
        ({"size": "64x64"}, "not bf16 at 64x64"),
        ({"num_frames": 16}, "num_frames is 16"),
        ({"num_frames": 21}, "num_frames is 21"),
    ],
)
def test_a_request_that_the_pipeline_would_round_is_refused(
    engine: WanEngine, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(GenerationFailed, match=message):
        engine.generate(generation_request(**changes), RecordingControl(), OWNER)


def test_each_size_may_have_its_own_shift(
    engine: WanEngine, config: WorkerConfig, device: Device
) -> None:
    shifted = config.model.model_copy(update={"flow_shift": {"96x96": 9.0}})
    modes = tuple(engine.loaded.values())
    other = WanEngine(shifted, "fingerprint", device, engine.components, modes)
    # The shift changes the steps between the first and the last timestep, so two steps are needed.
    two_steps = SHORT | {"num_inference_steps": 2}
    assert not np.array_equal(frames(other, **two_steps), frames(engine, **two_steps))
    assert engine.components.scheduler.config.flow_shift == 3.0


def test_a_shift_takes_effect_under_the_name_of_another_scheduler(edited, device: Device) -> None:
    """FlowMatchEulerDiscreteScheduler calls it `shift`, and ignores `flow_shift`."""
    edited.set_scheduler("FlowMatchEulerDiscreteScheduler", shift=3.0)
    own = load_engine(edited.with_modes("bf16"), device)
    edited.config = edited.with_model(flow_shift={"96x96": 9.0})
    shifted = load_engine(edited.with_modes("bf16"), device)
    two_steps = SHORT | {"num_frames": 1, "num_inference_steps": 2}
    assert not np.array_equal(frames(own, **two_steps), frames(shifted, **two_steps))


def test_the_modes_share_what_is_not_quantized(engine: WanEngine) -> None:
    bf16, quantized = (mode.transformer for mode in engine.loaded.values())
    for block in (0, 1, 37, 38, 39):
        ours, theirs = quantized.blocks[block].parameters(), bf16.blocks[block].parameters()
        assert all(a is b for a, b in zip(ours, theirs, strict=True))
    together = quant.weight_bytes(bf16, quantized)
    codes = sum(
        module.weight.numel()
        for block in bf16.blocks[2:37]
        for module in block.modules()
        if isinstance(module, torch.nn.Linear)
    )
    scales = 350 * 2 * 4
    assert together == quant.weight_bytes(bf16) + codes + scales


def test_a_quantized_mode_alone_keeps_no_bf16_weights_of_quantized_blocks(
    engine: WanEngine, config: WorkerConfig, device: Device
) -> None:
    alone = config.model_copy(update={"modes": config.modes[1:]})
    plans = plan_modes(alone, engine.model.fingerprint)
    (mode,) = load_modes(config.model.path, plans, device)
    assert not any(
        isinstance(module, torch.nn.Linear)
        for block in mode.transformer.blocks[2:37]
        for module in block.modules()
    )
    component_loader = ComponentLoader(config.model.path, device)
    component_loader.copy()
    components = component_loader.finish()
    only = WanEngine(config.model, "fingerprint", device, components, (mode,))
    assert np.array_equal(frames(only, mode="w8a8", **SHORT), frames(engine, mode="w8a8", **SHORT))


def test_the_start_log_names_what_was_loaded(engine: WanEngine) -> None:
    log = "\n".join(engine.describe())
    assert f"model: wan-mini ({engine.model.fingerprint})" in log
    assert "device: cpu, 1 thread\n" in log
    assert "modes: bf16, w8a8" in log
    assert "mode w8a8: 350 linears in 35 of 40 blocks quantized" in log
    for name, mode in engine.loaded.items():
        assert f"mode {name}: {mode.weight_bytes:,} bytes" in log
    assert engine.loaded["w8a8"].weight_bytes < 0.65 * engine.loaded["bf16"].weight_bytes


def test_the_offer_is_what_was_loaded(engine: WanEngine) -> None:
    assert engine.model.name == "wan-mini"
    assert engine.model.fingerprint == quant.model_fingerprint(engine.config.path)
    assert engine.modes[0].recipe_fingerprint is None
    assert engine.modes[1].recipe_fingerprint == quant.QuantRecipe.load("boundary-hif8").fingerprint


@pytest.mark.parametrize("steps", [1, 2])
def test_each_quantized_job_samples_how_its_activations_fit(engine: WanEngine, steps: int) -> None:
    short: dict[str, Any] = {"num_frames": 1, "num_inference_steps": steps}
    shares = engine.generate(
        generation_request(mode="w8a8", **short), RecordingControl(), OWNER
    ).act_shares
    assert shares is not None
    assert 0 <= shares.saturated < 0.001
    assert 0 <= shares.flushed < 0.1
    assert (
        engine.generate(generation_request(**short), RecordingControl(), OWNER).act_shares is None
    )


def test_a_job_that_stops_leaves_neither_hooks_nor_latents(engine: WanEngine) -> None:
    request = generation_request(mode="w8a8", num_frames=1, num_inference_steps=2)
    with pytest.raises(GenerationCancelled):
        engine.generate(request, StopAtStep(Stage.DENOISE, 1), OWNER)
    transformer = engine.loaded["w8a8"].transformer
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in transformer.modules())
    pipeline = engine._pipelines["w8a8"]
    assert pipeline.scheduler is engine.components.scheduler
