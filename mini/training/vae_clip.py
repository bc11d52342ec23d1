"""Run the Wan VAE on a whole clip at once, for training.

diffusers runs the VAE frame by frame with a feature cache, which saves memory but needs five times
as many kernel launches. The cached convolutions are plain causal convolutions over the whole clip,
and only the temporal resamplers treat the first frame differently. `whole_clip` replaces only the
resamplers, so that `vae.encoder(x)` and `vae.decoder(z)` without a cache give the same as
`vae.encode` and `vae.decode`; tests/mini/training/test_vae_clip.py compares them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResample
from torch import Tensor, nn


@contextmanager
def whole_clip(vae: AutoencoderKLWan) -> Iterator[None]:
    """Make encoder and decoder take whole clips without a feature cache within the context."""
    resamplers = [m for m in vae.modules() if isinstance(m, WanResample)]
    for module in resamplers:
        module.forward = partial(_resample, module)
    try:
        yield
    finally:
        for module in resamplers:
            del module.forward


def _resample(module: WanResample, x: Tensor, *_cache: Any, **_cached: Any) -> Tensor:
    first, rest = x[:, :, :1], x[:, :, 1:]
    if module.mode == "upsample3d" and rest.shape[2]:
        # The first latent frame gives one video frame, each later one two. The time convolution
        # starts after the first frame and does not use it.
        doubled = module.time_conv(rest)
        batch, channels, frames, height, width = doubled.shape
        doubled = doubled.reshape(batch, 2, channels // 2, frames, height, width)
        doubled = torch.stack((doubled[:, 0], doubled[:, 1]), 3)
        x = torch.cat([first, doubled.reshape(batch, channels // 2, 2 * frames, height, width)], 2)
    x = WanResample.forward(module, x)
    if module.mode == "downsample3d" and x.shape[2] > 1:
        x = torch.cat([x[:, :, :1], module.time_conv(x)], 2)
    return x


def encode_clip(vae: AutoencoderKLWan, video: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and log-variance of the latents. Call it within `whole_clip`.

    Args:
        video: [B, 3, F, H, W] in -1..1 → two tensors [B, 16, 1 + (F-1)/4, H/8, W/8].
    """
    mean, logvar = vae.quant_conv(vae.encoder(video)).chunk(2, dim=1)
    return mean, logvar.clamp(-30.0, 20.0)


def decode_clip(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Decode latents of `encode_clip` to an unclamped clip. Call it within `whole_clip`."""
    return vae.decoder(vae.post_quant_conv(latents))  # type: ignore[no-any-return]


def start_time_convolutions_as_copies(vae: AutoencoderKLWan) -> None:
    """Initialise each temporal resampler to repeat or keep frames.

    Training on clips then starts with the quality reached on single frames, instead of collapsing
    to the background.
    """
    for module in vae.modules():
        if not (isinstance(module, WanResample) and module.mode in ("upsample3d", "downsample3d")):
            continue
        weight = module.time_conv.weight
        identity = torch.eye(weight.shape[1]).repeat(weight.shape[0] // weight.shape[1], 1)
        with torch.no_grad():
            weight.zero_()
            weight[:, :, -1, 0, 0] = identity
            nn.init.zeros_(module.time_conv.bias)
