"""Train the VAE (first stage), on single frames until they are sharp, then on whole clips.

Trained on whole clips from the start, the VAE collapses to the background. Trained on short clips
only, it fails on later frames. Therefore single frames come first, then clips of full length.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from mini.architecture import NUM_FRAMES
from mini.training.autocast import mixed_precision
from mini.training.dataset import clip_pool, lay_out, scenes_of
from mini.training.optimizer import Optimizer, TrainingStep
from mini.training.settings import VaeSettings
from mini.training.vae_clip import (
    decode_clip,
    encode_clip,
    start_time_convolutions_as_copies,
    whole_clip,
)
from mini.world.render import render
from mini.world.scenes import Split

Report = Callable[[str, dict[str, float]], None]


def train_vae(
    vae: AutoencoderKLWan, settings: VaeSettings, report: Report, done_clip_s: float = 0.0
) -> None:
    """Train the VAE in place and set its latent statistics.

    Args:
        done_clip_s: seconds of whole-clip training already done; 0 starts from the beginning.
    """
    pool = clip_pool(settings.pool, settings.seed, vae.device)
    use_channels_last(vae)
    with whole_clip(vae):
        if not done_clip_s:
            _stage(vae, pool, settings, report, frames=1)
            start_time_convolutions_as_copies(vae)
        rest = replace(settings, clip_s=settings.clip_s - done_clip_s)
        _stage(vae, pool, rest, report, frames=NUM_FRAMES)
        _set_latent_statistics(vae, pool)


def use_channels_last(vae: AutoencoderKLWan) -> None:
    """Store convolution weights channels-last; activations then are channels-last as well."""
    for parameter in vae.parameters():
        if parameter.ndim == 5:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last_3d)
        elif parameter.ndim == 4 and parameter.shape[-1] > 1:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)


def _stage(
    vae: AutoencoderKLWan, pool: Tensor, settings: VaeSettings, report: Report, frames: int
) -> None:
    seconds = settings.image_s if frames == 1 else settings.clip_s
    batch = settings.image_batch if frames == 1 else settings.clip_batch
    optimizer = Optimizer(vae.parameters(), settings.peak_lr, seconds)
    clip_index = torch.zeros(batch, dtype=torch.long, device=pool.device)
    frame_index = torch.zeros(batch, dtype=torch.long, device=pool.device)

    def loss_of() -> Tensor:
        video = pool[clip_index] if frames > 1 else pool[clip_index, :, frame_index].unsqueeze(2)
        return _loss(vae, _signed(video), settings)

    step = TrainingStep(loss_of, optimizer)  # created while the learning rate is still 0
    progress, logged_at, steps = 0.0, time.monotonic(), 0
    optimizer.resume()
    while progress < 1.0:
        clip_index.random_(pool.shape[0])
        frame_index.random_(pool.shape[2])
        progress = optimizer.tick()
        step()
        steps += 1
        if optimizer.steps % 250 == 0 or progress >= 1.0:
            figures = {
                "steps": optimizer.steps,
                "loss": step.loss.item(),
                "step_ms": 1000 * (time.monotonic() - logged_at) / steps,
                "spent_s": optimizer.spent_s,
            }
            report(f"vae {frames}-frame", figures)
            logged_at, steps = time.monotonic(), 0
    optimizer.swap_average()


def _signed(video: Tensor) -> Tensor:
    return video.float() / 127.5 - 1


def _loss(vae: AutoencoderKLWan, video: Tensor, settings: VaeSettings) -> Tensor:
    with mixed_precision(video.device):
        mean, logvar = encode_clip(vae, video)
        mean, logvar = mean.float(), logvar.float()
        latents = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
        rebuilt = decode_clip(vae, latents).float()
    # The corner pixel is background in every scene.
    background = video[:, :, :, :1, :1]
    weight = 1 + settings.foreground_weight * (
        (video - background).abs().amax(1, keepdim=True) > 0.05
    )
    error = rebuilt - video
    divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    pixels = error.square() + settings.absolute_weight * error.abs()
    return (weight * pixels).mean() + settings.kl_weight * divergence


@torch.no_grad()
def _set_latent_statistics(vae: AutoencoderKLWan, pool: Tensor) -> None:
    with mixed_precision(pool.device):
        batches = torch.split(pool[:512], 64)
        latents = torch.cat([encode_clip(vae, _signed(batch))[0].float() for batch in batches])
    mean = latents.mean(dim=(0, 2, 3, 4)).tolist()
    std = latents.std(dim=(0, 2, 3, 4)).tolist()
    vae.register_to_config(
        latents_mean=[round(value, 5) for value in mean],
        latents_std=[round(value, 5) for value in std],
    )


@torch.no_grad()
def reconstruction_psnr_db(vae: AutoencoderKLWan, split: Split, count: int, seed: int) -> Tensor:
    """Encode and decode `count` clips of `split` and return the PSNR of each clip in dB."""
    scenes = scenes_of(split, count, seed)
    batch = lay_out(scenes, seed)
    values = []
    for start in range(0, count, 8):
        video = render(batch.select(slice(start, start + 8)).to(vae.device))
        video = (video * 255).round() / 255
        latents = vae.encode((video * 2 - 1).to(vae.dtype)).latent_dist.mean
        rebuilt = (vae.decode(latents).sample.float() / 2 + 0.5).clamp(0, 1)
        error = (rebuilt - video).square().mean(dim=(1, 2, 3, 4))
        values.append(-10 * torch.log10(error.clamp_min(1e-10)))
    return torch.cat(values).cpu()
