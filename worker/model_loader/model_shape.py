"""Read what decides a model's memory: configurations and headers, no weights."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quant.weights.fingerprint import read_transformer_config
from quant.weights.weight_files import stored_weights
from worker.errors import ModelUnusable

VAE_BASE_CHANNELS = 96  # what AutoencoderKLWan has where its configuration does not say


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes of a model's components.

    Attributes:
        transformer: its configuration.
        text_encoder, vae: numbers of values in their weights.
        vae_channels: base channels of the VAE's decoder.
    """

    transformer: Mapping[str, Any]
    text_encoder: int
    vae: int
    vae_channels: int


WAN_14B = ModelShape(
    transformer={
        "num_layers": 40,
        "num_attention_heads": 40,
        "attention_head_dim": 128,
        "ffn_dim": 13824,
        "text_dim": 4096,
        "freq_dim": 256,
        "cross_attn_norm": True,
        "in_channels": 16,
        "out_channels": 16,
        "qk_norm": "rms_norm_across_heads",
    },
    text_encoder=5_680_910_336,
    vae=126_892_531,
    vae_channels=VAE_BASE_CHANNELS,
)
"""Wan2.1-T2V-14B as published in diffusers' format."""


def read_model_shape(folder: Path) -> ModelShape:
    """Read the sizes of the components in a model's folder.

    Raises:
        ModelUnusable, quant.QuantError: the model's files cannot be read.
    """
    return ModelShape(
        transformer=read_transformer_config(folder),
        text_encoder=_values(folder / "text_encoder"),
        vae=_values(folder / "vae"),
        vae_channels=_vae_channels(folder),
    )


def _vae_channels(folder: Path) -> int:
    file = folder / "vae" / "config.json"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        return int(values.get("base_dim", VAE_BASE_CHANNELS))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ModelUnusable(f"The model file {file} cannot be read: {error}") from error


def _values(folder: Path) -> int:
    """Count a component's weights, whatever type its files store."""
    stored = stored_weights(folder)
    if not stored:
        raise ModelUnusable(f"The model component {folder} lacks a file *.safetensors.")
    return sum(math.prod(each.shape) for each in stored.values())
