"""Test that decoding frame by frame equals decoding all at once, to the last bit."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.video_processor import VideoProcessor

from worker.engine.vae_decoder import (
    decode_chunks,
    decode_tiled,
    denormalize,
    stop_points,
    to_frames,
)


@pytest.fixture(scope="module")
def vae(model_folder: Path) -> AutoencoderKLWan:
    return AutoencoderKLWan.from_pretrained(model_folder / "vae", dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def latents() -> torch.Tensor:
    return torch.randn(1, 16, 3, 4, 4, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_chunks_equal_the_whole_decoding(vae: AutoencoderKLWan, latents: torch.Tensor) -> None:
    chunks = list(decode_chunks(vae, latents))
    assert [chunk.shape[2] for chunk in chunks] == [1, 4, 4]
    assert torch.equal(torch.cat(chunks, dim=2), vae.decode(latents).sample)


@torch.no_grad()
def test_tiles_give_the_chunks_that_diffusers_tiles_would(
    model_folder: Path, latents: torch.Tensor
) -> None:
    tiled = AutoencoderKLWan.from_pretrained(model_folder / "vae", dtype=torch.float32).eval()
    tiled.enable_tiling(24, 24, 16, 16)  # 32 px are more than one tile then
    chunks = list(decode_tiled(tiled, latents))
    assert [chunk.shape[2] for chunk in chunks] == [1, 4, 4]
    whole = tiled.decode(latents).sample
    assert torch.equal(torch.cat(chunks, dim=2), whole)
    tiled.disable_tiling()
    assert not torch.equal(tiled.decode(latents).sample, whole), "there was one tile only"


@torch.no_grad()
def test_an_abandoned_decoding_leaves_the_next_one_alone(
    vae: AutoencoderKLWan, latents: torch.Tensor
) -> None:
    whole = vae.decode(latents).sample
    abandoned = decode_chunks(vae, latents * 2)
    next(abandoned)
    next(abandoned)
    abandoned.close()
    assert torch.equal(torch.cat(list(decode_chunks(vae, latents)), dim=2), whole)


def test_gradients_are_off_while_decoding_and_as_before_in_between(
    vae: AutoencoderKLWan, latents: torch.Tensor
) -> None:
    chunks = decode_chunks(vae, latents)
    assert not next(chunks).requires_grad
    assert torch.is_grad_enabled()
    chunks.close()


def test_frames_are_rounded_as_diffusers_does(vae: AutoencoderKLWan) -> None:
    video = torch.rand(1, 3, 4, 8, 16) * 2.4 - 1.2
    frames = np.stack(to_frames(video))
    theirs = VideoProcessor(vae_scale_factor=8).postprocess_video(video, output_type="np")[0]
    assert frames.shape == (4, 8, 16, 3)
    assert frames.dtype == np.uint8
    assert np.array_equal(frames, (theirs * 255).round().astype(np.uint8))
    assert all(frame.flags.c_contiguous for frame in to_frames(video))


def test_denormalize_undoes_the_normalisation_of_training() -> None:
    vae = AutoencoderKLWan(
        base_dim=4, z_dim=2, num_res_blocks=1, latents_mean=[0.5, -1.0], latents_std=[2.0, 0.25]
    )
    raw = torch.randn(1, 2, 3, 4, 4)
    mean = torch.tensor([0.5, -1.0]).view(1, 2, 1, 1, 1)
    std = torch.tensor([2.0, 0.25]).view(1, 2, 1, 1, 1)
    assert torch.allclose(denormalize(vae, (raw - mean) / std), raw, atol=1e-6)


def test_a_decoder_has_many_stop_points(vae: AutoencoderKLWan) -> None:
    """At 480p one latent frame takes seconds on an NPU; a stop every few convolutions is enough."""
    convolutions = sum(1 for name, _ in vae.decoder.named_modules() if name.endswith("conv1"))
    assert len(stop_points(vae)) > convolutions
