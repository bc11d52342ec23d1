"""Decode latents into frames, one latent frame at a time.

`AutoencoderKLWan.decode` also runs its decoder once per latent frame, with a feature cache between
the runs, but returns only after the last. Here the same loop is a generator with bit-equal results.
So a video is encoded while it is decoded, only a few frames are in memory at a time, and a job can
be stopped in between.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import cast

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanCausalConv3d,
    WanResample,
    WanResidualBlock,
)
from torch import Tensor, nn

from worker.interface import Frame


def denormalize(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Undo the per-channel normalisation that the transformer uses; [B, C, F, H, W], same shape."""
    # In the same order of operations as diffusers' pipeline, so that results are bit-equal.
    shape = (1, vae.config.z_dim, 1, 1, 1)
    mean = torch.tensor(vae.config.latents_mean).view(shape).to(latents.device, latents.dtype)
    inv_std = 1.0 / torch.tensor(vae.config.latents_std).view(shape).to(
        latents.device, latents.dtype
    )
    return latents / inv_std + mean


@torch.no_grad()
def decode_chunks(vae: AutoencoderKLWan, latents: Tensor) -> Generator[Tensor]:
    """Decode latents [1, C, F, H, W] into frames [1, 3, f, 8H, 8W] in -1..1.

    f is 1 for the first latent frame and 4 for every other. The chunks concatenated along their
    third axis equal `vae.decode(latents).sample`.
    """
    features = vae.post_quant_conv(latents)
    convolutions = sum(isinstance(module, WanCausalConv3d) for module in vae.decoder.modules())
    cache: list[Tensor | str | None] = [None] * convolutions
    for index in range(latents.shape[2]):
        chunk = vae.decoder(
            features[:, :, index : index + 1],
            feat_cache=cache,
            feat_idx=[0],
            first_chunk=index == 0,
        )
        yield torch.clamp(chunk, min=-1.0, max=1.0)


@torch.no_grad()
def decode_tiled(vae: AutoencoderKLWan, latents: Tensor) -> Generator[Tensor]:
    """Decode as `decode_chunks` does, but in tiles: slower, with far less memory, not bit-equal.

    diffusers decodes each tile for all frames before the next tile, so the first chunk comes only
    after all the work. The concatenated chunks equal `vae.tiled_decode(latents).sample`.
    """
    try:
        video = vae.tiled_decode(latents, return_dict=False)[0]
    finally:
        vae.clear_cache()  # a decode that is stopped would leave it on the device
    yield video[:, :, :1]
    stride = vae.config.scale_factor_temporal
    for start in range(1, video.shape[2], stride):
        yield video[:, :, start : start + stride]


def to_frames(chunk: Tensor) -> list[Frame]:
    """Turn frames [1, 3, f, H, W] in -1..1 into f arrays; rounded on the device, then copied."""
    rounded = ((chunk[0] * 0.5 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    frames = rounded.permute(1, 2, 3, 0).contiguous().cpu().numpy()
    return cast(list[Frame], list(frames))


def stop_points(vae: AutoencoderKLWan) -> list[nn.Module]:
    """List the decoder's stages, before each of which a job may stop within one latent frame."""
    return [m for m in vae.decoder.modules() if isinstance(m, WanResidualBlock | WanResample)]
