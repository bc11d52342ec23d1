"""Make training data: render, encode and caption random scenes of one split."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from mini.architecture import LATENT_SHAPE, TEXT_TOKENS
from mini.training.autocast import mixed_precision
from mini.training.vae_clip import encode_clip, whole_clip
from mini.world.render import Tracks, layout, render, tracks
from mini.world.scenes import PAIR_SHARE, Scene, Split, caption, sample_scene

WORDINGS = 2


def scenes_of(split: Split, count: int, seed: int, pair_share: float = PAIR_SHARE) -> list[Scene]:
    """Draw `count` scenes of one split; the same seed gives the same scenes."""
    rng = random.Random(f"{split} scenes {seed}")
    return [sample_scene(rng, split, pair_share) for _ in range(count)]


def lay_out(scenes: list[Scene], seed: int) -> Tracks:
    """Give the scenes random layouts and batch them on the CPU."""
    rng = random.Random(f"layouts {seed}")
    return tracks(scenes, [layout(scene, rng) for scene in scenes])


def tokenize(tokenizer: PreTrainedTokenizerFast, captions: list[str]) -> Tensor:
    """Tokenize captions: [N, TEXT_TOKENS] int16, padded with 0."""
    encoded = tokenizer(
        captions,
        padding="max_length",
        max_length=TEXT_TOKENS,
        truncation=True,
        return_tensors="pt",
    )
    ids: Tensor = encoded["input_ids"]
    return ids.to(torch.int16)


def clips(batch: Tracks, size: int) -> Iterator[Tensor]:
    """Render `size` scenes at a time: [size, 3, F, H, W] in 0..1."""
    for start in range(0, batch.radius.shape[0], size):
        yield render(batch.select(slice(start, start + size)))


def clip_pool(count: int, seed: int, device: torch.device) -> Tensor:
    """Render training clips to draw VAE batches from: [count, 3, F, H, W] uint8."""
    batch = lay_out(scenes_of(Split.TRAIN, count, seed), seed).to(device)
    pool = [(clip * 255).round().to(torch.uint8) for clip in clips(batch, 128)]
    return torch.cat(pool)


@dataclass(frozen=True, slots=True)
class Corpus:
    """The training data of the transformer.

    Attributes:
        latents: [N, 16, 5, 12, 12] bf16, normalised to mean 0 and deviation 1 per channel.
        tokens: [N, WORDINGS, TEXT_TOKENS] int16, several captions of each scene.
        empty: [TEXT_TOKENS], the empty prompt.
    """

    latents: Tensor
    tokens: Tensor
    empty: Tensor


def build_corpus(
    vae: AutoencoderKLWan,
    tokenizer: PreTrainedTokenizerFast,
    count: int,
    seed: int,
    pair_share: float = PAIR_SHARE,
) -> Corpus:
    """Render, encode and caption `count` training scenes on the VAE's device."""
    device = vae.device
    scenes = scenes_of(Split.TRAIN, count, seed, pair_share)
    rng = random.Random(f"wordings {seed}")
    captions = [caption(scene, rng) for scene in scenes for _ in range(WORDINGS)]
    tokens = tokenize(tokenizer, captions).view(count, WORDINGS, TEXT_TOKENS)
    latents = encode_scenes(vae, lay_out(scenes, seed))
    return Corpus(latents, tokens.to(device), tokenize(tokenizer, [""])[0].to(device))


@torch.no_grad()
def encode_scenes(vae: AutoencoderKLWan, batch: Tracks, size: int = 128) -> Tensor:
    """Encode laid-out scenes to normalised latents: [N, 16, 5, 12, 12] bf16 on the VAE's device."""
    device = vae.device
    mean = torch.tensor(vae.config.latents_mean, device=device).view(1, -1, 1, 1, 1)
    std = torch.tensor(vae.config.latents_std, device=device).view(1, -1, 1, 1, 1)
    count = batch.radius.shape[0]
    latents = torch.empty(count, *LATENT_SHAPE, dtype=torch.bfloat16, device=device)
    with whole_clip(vae), mixed_precision(device):
        for start, clip in zip(range(0, count, size), clips(batch.to(device), size), strict=True):
            encoded, _ = encode_clip(vae, clip * 2 - 1)
            latents[start : start + size] = ((encoded.float() - mean) / std).bfloat16()
    return latents
