"""Whole-clip passes for training equal diffusers' frame-by-frame passes."""

import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResample

from mini.architecture import build_vae
from mini.training.vae_clip import (
    decode_clip,
    encode_clip,
    start_time_convolutions_as_copies,
    whole_clip,
)

# The two passes sum in different orders in FP32.
TOLERANCE = 1e-4


@pytest.fixture
def vae() -> AutoencoderKLWan:
    torch.manual_seed(0)
    return build_vae().eval()


@pytest.mark.parametrize("frames", [1, 5, 17])
@torch.no_grad()
def test_equals_the_cached_passes(vae: AutoencoderKLWan, frames: int) -> None:
    video = torch.rand(1, 3, frames, 32, 48) * 2 - 1
    expected = vae.encode(video).latent_dist.mean
    rebuilt = vae.decode(expected).sample
    with whole_clip(vae):
        mean, _ = encode_clip(vae, video)
        decoded = decode_clip(vae, mean).clamp(-1, 1)
    torch.testing.assert_close(mean, expected, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(decoded, rebuilt, atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_leaves_the_vae_as_it_was(vae: AutoencoderKLWan) -> None:
    video = torch.rand(1, 3, 5, 32, 32) * 2 - 1
    before = vae.encode(video).latent_dist.mean
    with whole_clip(vae):
        encode_clip(vae, video)
    assert torch.equal(vae.encode(video).latent_dist.mean, before)


@torch.no_grad()
def test_time_convolutions_start_as_copies(vae: AutoencoderKLWan) -> None:
    start_time_convolutions_as_copies(vae)
    resamplers = [m for m in vae.modules() if isinstance(m, WanResample)]
    modes = [m.mode for m in resamplers if hasattr(m, "time_conv")]
    assert sorted(modes) == ["downsample3d"] * 2 + ["upsample3d"] * 2
    for module in resamplers:
        if module.mode == "upsample3d":
            frames = torch.randn(1, module.dim, 3, 4, 4)
            first, second = module.time_conv(frames).chunk(2, dim=1)
            assert torch.equal(first, frames)
            assert torch.equal(second, frames)
        if module.mode == "downsample3d":
            frames = torch.randn(1, module.dim, 5, 4, 4)
            assert torch.equal(module.time_conv(frames), frames[:, :, 2::2])
