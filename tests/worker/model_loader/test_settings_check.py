"""Test which settings of a model's folder are refused, because they contradict each other."""

from __future__ import annotations

import math
from typing import Any

import pytest

from worker.device import Device
from worker.errors import ModelUnusable
from worker.model_loader.settings_check import check_settings
from worker.startup import load_engine

INDEX = "model_index.json"
TRANSFORMER = "transformer/config.json"
VAE = "vae/config.json"
TEXTS = "text_encoder/config.json"
SCHEDULER = "scheduler/scheduler_config.json"

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    # parts that do not fit each other
    (TRANSFORMER, {"in_channels": 36}, rf"in_channels in {TRANSFORMER} is 36, but z_dim .* is 16"),
    (TRANSFORMER, {"out_channels": 32}, rf"out_channels in {TRANSFORMER} is 32, but z_dim .* 16"),
    (TRANSFORMER, {"text_dim": 4096}, rf"text_dim .* is 4096, but d_model in {TEXTS} is 96"),
    (TEXTS, {"d_model": 64}, r"text_dim .* is 96, but d_model .* is 64"),
    (VAE, {"z_dim": 48}, r"in_channels .* is 16, but z_dim .* is 48"),
    (VAE, {"latents_mean": [0.0] * 48}, r"number of latents_mean .* is 48, but z_dim .* is 16"),
    (VAE, {"latents_std": [1.0]}, r"number of latents_std .* is 1, but z_dim .* is 16"),
    # frames that would not be those of the request
    (TRANSFORMER, {"patch_size": [1, 1, 1]}, r"patch_size .* is \(1, 1, 1\), but .* \(1, 2, 2\)"),
    (VAE, {"patch_size": 2}, rf"patch_size in {VAE} is 2, but what this worker decodes is None"),
    (VAE, {"out_channels": 12}, r"out_channels .* is 12, but .* colours is 3"),
    (VAE, {"scale_factor_spatial": 16}, r"scale_factor_spatial .* is 16, but .*dim_mult .* is 8"),
    (VAE, {"dim_mult": [1, 2, 4]}, r"scale_factor_spatial .* is 8, but .*dim_mult there is 4"),
    (VAE, {"scale_factor_temporal": 1}, r"scale_factor_temporal .* is 1, but .*downsample .* is 4"),
    (
        VAE,
        {"scale_factor_temporal": 2, "temperal_downsample": [False, False, True]},
        r"scale_factor_temporal .* is 2, but the factor of this service's requests is 4",
    ),
    # classes
    (
        INDEX,
        {"transformer": ["diffusers", "WanVACETransformer3DModel"]},
        r"is 'diffusers.WanVACETransformer3DModel', but .* 'diffusers.WanTransformer3DModel'",
    ),
    (
        INDEX,
        {"scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]},
        r"FlowMatchEulerDiscreteScheduler', but _class_name in .* 'UniPCMultistepScheduler'",
    ),
    (INDEX, {"scheduler": ["mine", "UniPCMultistepScheduler"]}, r"'mine.UniPC.*, but .*'diffusers"),
    (INDEX, {"vae": ["diffusers", "AutoencoderKL"]}, r"AutoencoderKL', but .*AutoencoderKLWan'"),
    (INDEX, {"text_encoder": ["transformers", "T5EncoderModel"]}, r"T5.*, but .*UMT5EncoderModel"),
    (INDEX, {"vae": None}, r"settings in .* cannot be read"),
    (TRANSFORMER, {"_class_name": "Other"}, r"WanTransformer3DModel', but _class_name .* 'Other'"),
    (VAE, {"_class_name": "AutoencoderKLMochi"}, r"_class_name in vae.* 'AutoencoderKLMochi'"),
    (SCHEDULER, {"_class_name": "DDIMScheduler"}, r"UniPC.*, but _class_name .* 'DDIMScheduler'"),
    (TEXTS, {"architectures": ["T5EncoderModel"]}, r"UMT5.*, but architectures in .* 'T5Encoder"),
    (TEXTS, {"model_type": "t5"}, r"UMT5.*, but model_type in .* 't5'"),
    # settings that nothing would use
    (TRANSFORMER, {"num_layer": 30}, r"sets num_layer to 30, which WanTransformer3DModel .*ignore"),
    (VAE, {"scaling_factor": 0.5}, r"sets scaling_factor to 0.5, which AutoencoderKLWan .*ignore"),
    (SCHEDULER, {"shift": 9.0}, r"sets shift to 9.0, which UniPCMultistepScheduler .*ignore"),
    (INDEX, {"expand_timesteps": True}, r"sets expand_timesteps to True, as only Wan2.2"),
    (INDEX, {"boundary_ratio": 0.875}, r"sets boundary_ratio to 0.875, as only Wan2.2"),
    # numbers that would make latents constant or not finite
    (VAE, {"latents_std": [1.0] * 15 + [0.0]}, r"latents_std .* is 0.0 for channel 15"),
    (VAE, {"latents_std": [-1.0] * 16}, r"latents_std .* is -1.0 for channel 0"),
    (VAE, {"latents_std": [math.inf] * 16}, r"latents_std .* is inf"),
    (VAE, {"latents_mean": [math.nan] * 16}, r"latents_mean .* is nan"),
    # offers beyond what the transformer has positions for
    (TRANSFORMER, {"rope_max_seq_len": 4}, r"max_frames = 17 .* 5 positions, but .* is 4"),
    (TRANSFORMER, {"rope_max_seq_len": 5}, r"size 96x96 .* 6 positions, but .* is 5"),
]


@pytest.mark.parametrize(("file", "values", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_a_contradiction_is_refused_with_both_values(
    edited, file: str, values: dict[str, Any], message: str
) -> None:
    edited.set(file, **values)
    with pytest.raises(ModelUnusable, match=message) as caught:
        check_settings(edited.config.model)
    assert "\n" not in str(caught.value)


ACCEPTED: list[tuple[str, dict[str, Any]]] = [
    (TRANSFORMER, {}),
    (TRANSFORMER, {"out_channels": None}),
    (TRANSFORMER, {"_name_or_path": "/somewhere", "a_setting_of_later_versions": None}),
    (VAE, {"off_in_later_versions": False}),
    (TEXTS, {"architectures": ["UMT5ForConditionalGeneration"], "task_specific_params": {"a": 1}}),
    (TEXTS, {"architectures": None}),
    (INDEX, {"tokenizer": ["transformers", "T5TokenizerFast"]}),
    (TRANSFORMER, {"rope_max_seq_len": 6}),
]


@pytest.mark.parametrize(("file", "values"), ACCEPTED, ids=lambda value: str(value)[:40])
def test_what_the_libraries_load_as_it_is_meant_is_accepted(
    edited, file: str, values: dict[str, Any]
) -> None:
    edited.set(file, **values)
    check_settings(edited.config.model)


def test_a_setting_that_is_left_out_has_the_library_s_default(edited) -> None:
    edited.drop(TRANSFORMER, "in_channels", "out_channels", "rope_max_seq_len", "_class_name")
    edited.drop(VAE, "z_dim", "scale_factor_spatial", "patch_size", "temperal_downsample")
    check_settings(edited.config.model)
    edited.drop(TRANSFORMER, "text_dim")
    with pytest.raises(ModelUnusable, match=r"text_dim .* is 4096, but d_model .* is 96"):
        check_settings(edited.config.model)


def test_the_published_model_is_accepted(edited) -> None:
    """Wan2.1-T2V-14B's settings, as far as they differ in kind from the miniature's."""
    edited.set(INDEX, tokenizer=["transformers", "T5TokenizerFast"])
    edited.drop(INDEX, "boundary_ratio", "expand_timesteps", "transformer_2")
    edited.set(TRANSFORMER, num_attention_heads=40, attention_head_dim=128, text_dim=4096)
    edited.set(TEXTS, d_model=4096, num_layers=24, vocab_size=256384)
    edited.drop(VAE, "in_channels", "out_channels", "is_residual", "decoder_base_dim", "patch_size")
    edited.drop(VAE, "scale_factor_spatial", "scale_factor_temporal")
    later = ("sigma_max", "sigma_min", "shift_terminal", "time_shift_type", "use_dynamic_shifting")
    edited.drop(SCHEDULER, *later)
    sizes = ("832x480", "1280x720")
    check_settings(edited.with_model(sizes=sizes, max_frames=81).model)


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
@pytest.mark.parametrize("file", [TRANSFORMER, VAE, TEXTS, SCHEDULER])
def test_a_file_that_cannot_be_read_is_named(edited, file: str, text: str) -> None:
    (edited.folder / file).write_bytes(text.encode("latin-1"))
    with pytest.raises(ModelUnusable, match=rf"{file} cannot be read"):
        check_settings(edited.config.model)


def test_a_worker_does_not_start_with_a_contradiction(edited, device: Device) -> None:
    edited.set(INDEX, expand_timesteps=True)
    with pytest.raises(ModelUnusable, match="expand_timesteps"):
        load_engine(edited.with_modes("bf16"), device)


def test_more_tokens_than_embeddings_are_refused(edited, device: Device) -> None:
    """A prompt with one of the others would end the job, on a GPU also the process."""
    edited.change("text_encoder", "shared.weight", lambda rows: rows[:480].clone())
    edited.set(TEXTS, vocab_size=480)
    with pytest.raises(ModelUnusable, match=r"tokens in .* is 490, but vocab_size .* is 480"):
        load_engine(edited.with_modes("bf16"), device)
