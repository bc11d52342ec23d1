"""Compute a model's memory before it is loaded, and decide where its components go.

Weights are added up from headers and configurations. Activations are estimated for the largest
offered size and number of frames:
- Denoising: 12 BF16 values of the transformer's width for each token. A diffusers forward of the
  14B on an H100 took 11.3 (3.5 GiB at 32,760 tokens); adding up live tensors gives 11.1. Quantized
  modes that are emulated, by configuration or on a device without FP8, take 16: activations are
  rounded in plain torch, in pieces. Modes that fall back later because kernels do not run are not
  known yet.
- VAE: 204 bytes for each pixel and each of the decoder's base channels, in FP32: live tensors of
  `worker.engine.vae_decoder` added up, the same at 480p and 720p. With tiling it is the bytes of
  one tile plus 3.5 times the whole video, which diffusers assembles from its tiles (added up: 3.3
  at 720p with 81 frames, less for smaller videos).
What cannot be known beforehand (the runtime's context, workspaces, fragmentation) must fit in the
reserve.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

from jobs.geometry import parse_size, sequence_tokens
from quant import QuantRecipe
from quant.transformer.meta_model import shared_meta_model, shared_quantized_meta_model
from quant.weights.fingerprint import read_transformer_config
from quant.weights.weight_files import stored_weights
from worker.config import WorkerConfig
from worker.device import Device
from worker.errors import ModelUnusable, TooLittleMemory

GIB = 1 << 30
RESERVE_BYTES = 2 * GIB
WIDTHS_PER_TOKEN = 12
EMULATED_WIDTHS_PER_TOKEN = 16
CACHED_PER_TOKEN = 6  # what a step cache keeps at most, with guidance: 2.0 GB at 32,760 tokens
VAE_BYTES_PER_PX_AND_CHANNEL = 204
VAE_BASE_CHANNELS = 96  # what AutoencoderKLWan has where its configuration does not say
TILE_PX = 256 * 256
ENCODING_BYTES = GIB // 2  # activations of the text encoder; a prompt has 512 tokens at most
_ENCODER_PLACEMENTS = ("device", "encode", "host")  # the first that fits is taken


@dataclass(frozen=True, slots=True)
class Need:
    """The peak memory of one choice of placement, in bytes.

    Attributes:
        resident: what stays on the device, by name; all of it counts.
        transient: what each stage adds, by stage; stages do not overlap, so the largest counts.
    """

    resident: dict[str, int]
    transient: dict[str, int]

    @property
    def total(self) -> int:
        """The peak: all that is resident, and the largest of the rest."""
        return sum(self.resident.values()) + max(self.transient.values())

    def __str__(self) -> str:
        resident = ", ".join(f"{name} {_gib(size)}" for name, size in self.resident.items())
        transient = ", ".join(f"{name} {_gib(size)}" for name, size in self.transient.items())
        return f"{_gib(self.total)} GiB ({resident}, and the largest of: {transient})"


@dataclass(frozen=True, slots=True)
class Placement:
    """The chosen place of the text encoder and mode of the VAE; resolved, never "auto".

    Attributes:
        text_encoder: "device", "host", or "encode": on the device only while it encodes.
        vae_tiling: whether the VAE decodes in tiles.
        available_bytes: device memory for this process; None on the CPU.
    """

    text_encoder: str
    vae_tiling: bool
    need: Need
    available_bytes: int | None

    def text_encoder_load_device(self, device: Device) -> torch.device:
        """Return where the text encoder is loaded: for "encode" too, which copies it, the host."""
        return device.torch_device if self.text_encoder == "device" else torch.device("cpu")

    def __str__(self) -> str:
        tiles = "in tiles" if self.vae_tiling else "whole"
        return f"text encoder: {self.text_encoder}, VAE decodes {tiles}, at most {self.need} needed"


@dataclass(frozen=True, slots=True)
class ModelBytes:
    """The bytes of a model's components and of its activations at the largest size and frames.

    Attributes:
        transformer: all modes together, with shared tensors counted once.
        transformer_loading: the peak while they are loaded; more if BF16 is read only to quantize.
    """

    transformer: int
    transformer_loading: int
    text_encoder: int
    vae: int
    denoising: int
    decoding: int
    decoding_tiled: int

    def need(self, text_encoder: str, tiled: bool) -> Need:
        """Add up the memory for one placement of the text encoder."""
        decoding = self.decoding_tiled if tiled else self.decoding
        resident = {"transformer": self.transformer, "VAE": self.vae, "reserve": RESERVE_BYTES}
        transient = {
            "denoising": self.denoising,
            "decoding in tiles" if tiled else "decoding": decoding,
        }
        if text_encoder == "device":
            resident["text encoder"] = self.text_encoder
        elif text_encoder == "encode":
            transient["text encoder"] = self.text_encoder + ENCODING_BYTES
        return Need(resident, transient | self._quantizing)

    def follower_need(self) -> Need:
        """Add up the memory of a follower, which only denoises.

        It counts all tokens, as each of two ranks has all of them with guidance.
        """
        resident = {"transformer": self.transformer, "reserve": RESERVE_BYTES}
        return Need(resident, {"denoising": self.denoising} | self._quantizing)

    @property
    def _quantizing(self) -> dict[str, int]:
        extra = self.transformer_loading - self.transformer
        return {"quantizing": extra} if extra else {}


def place_model(
    config: WorkerConfig,
    recipes: Sequence[QuantRecipe | None],
    device: Device,
    available_bytes: int | None,
) -> Placement:
    """Choose the first placement that fits, or refuse the model; nothing has been loaded yet.

    Args:
        recipes: of the modes, in their order; None for BF16.
        available_bytes: device memory for this process; None on the CPU, where device and host are
            the same.

    Raises:
        TooLittleMemory: names the whole sum, the available memory, and remedies.
        ModelUnusable, quant.QuantError: the model's files cannot be read.
    """
    size = measure_model(config, recipes, device)
    choices = [
        (text_encoder, tiled)
        for tiled in _allowed(config.model.vae_tiling, {"off": False, "on": True})
        for text_encoder in _allowed(
            config.model.text_encoder, {each: each for each in _ENCODER_PLACEMENTS}
        )
    ]
    for text_encoder, tiled in choices:
        need = size.need(text_encoder, tiled)
        if available_bytes is None or need.total <= available_bytes:
            return Placement(text_encoder, tiled, need, available_bytes)
    assert available_bytes is not None, "without a limit the first choice fits"
    least = min((size.need(*choice) for choice in choices), key=lambda need: need.total)
    raise TooLittleMemory(_refusal(config, recipes, least, available_bytes, "the device,"))


def check_follower(
    config: WorkerConfig,
    recipes: Sequence[QuantRecipe | None],
    device: Device,
    available_bytes: int | None,
) -> None:
    """Refuse a follower whose device lacks memory; `available_bytes` as in `place_model`.

    Raises:
        TooLittleMemory: names the whole sum, the available memory, and remedies.
        ModelUnusable, quant.QuantError: the model's files cannot be read.
    """
    need = measure_model(config, recipes, device).follower_need()
    if available_bytes is not None and need.total > available_bytes:
        where = f"device {device.index}, which denoises with the first,"
        raise TooLittleMemory(_refusal(config, recipes, need, available_bytes, where))


def measure_model(
    config: WorkerConfig, recipes: Sequence[QuantRecipe | None], device: Device
) -> ModelBytes:
    """Add up a model's weights from configurations and headers, and estimate its activations.

    Raises:
        ModelUnusable, quant.QuantError: the model's files cannot be read.
    """
    folder = config.model.path
    transformer = read_transformer_config(folder)
    base = shared_meta_model(transformer, device.dtype)
    distinct = {
        mode.transformer_key: (mode, recipe)
        for mode, recipe in zip(config.modes, recipes, strict=True)
    }.values()
    trees: list[nn.Module] = [
        base if recipe is None else shared_quantized_meta_model(transformer, recipe, device.dtype)
        for _, recipe in distinct
    ]
    quantizes_bf16 = len(distinct) > 1 and any(mode.packed is None for mode, _ in distinct)
    width, height = max(map(parse_size, config.model.sizes), key=math.prod)
    pixels = width * height
    tokens = sequence_tokens(width, height, config.model.max_frames)
    per_px = VAE_BYTES_PER_PX_AND_CHANNEL * _vae_channels(folder) * device.vae_dtype.itemsize // 4
    video = pixels * 3 * config.model.max_frames * device.vae_dtype.itemsize
    return ModelBytes(
        transformer=_tree_bytes(trees),
        transformer_loading=_tree_bytes([*trees, base] if quantizes_bf16 else trees),
        text_encoder=_component_bytes(folder / "text_encoder", device.dtype),
        vae=_component_bytes(folder / "vae", device.vae_dtype),
        denoising=_denoising_bytes(config, tokens, base.config, device),
        decoding=pixels * per_px,
        decoding_tiled=min(pixels, TILE_PX) * per_px + 7 * video // 2,
    )


def _denoising_bytes(config: WorkerConfig, tokens: int, transformer: Any, device: Device) -> int:
    quantized = [mode for mode in config.modes if mode.recipe is not None]
    emulated = any(mode.exact_emulation or device.emulates for mode in quantized)
    widths = EMULATED_WIDTHS_PER_TOKEN if emulated else WIDTHS_PER_TOKEN
    if any(mode.step_cache is not None for mode in config.modes):
        widths += CACHED_PER_TOKEN
    # Blocks cache keys and values of the prompt and the negative prompt.
    prompts = 2 * 2 * config.model.text_tokens * transformer.num_layers
    width = transformer.num_attention_heads * transformer.attention_head_dim
    return int((tokens * widths + prompts) * width * torch.bfloat16.itemsize)


def _vae_channels(folder: Path) -> int:
    file = folder / "vae" / "config.json"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        return int(values.get("base_dim", VAE_BASE_CHANNELS))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ModelUnusable(f"The model file {file} cannot be read: {error}") from error


def _tree_bytes(trees: Iterable[nn.Module]) -> int:
    """Add up module trees on the meta device, where shared tensors are the same objects."""
    tensors = chain.from_iterable((*tree.parameters(), *tree.buffers()) for tree in trees)
    return sum({id(tensor): tensor.nbytes for tensor in tensors}.values())


def _component_bytes(folder: Path, dtype: torch.dtype) -> int:
    """Add up a component's weights in `dtype`, whatever type its files store."""
    stored = stored_weights(folder)
    if not stored:
        raise ModelUnusable(f"The model component {folder} lacks a file *.safetensors.")
    return sum(math.prod(each.shape) * dtype.itemsize for each in stored.values())


def _allowed(configured: str, choices: dict[str, Any]) -> list[Any]:
    return list(choices.values()) if configured == "auto" else [choices[configured]]


def _refusal(
    config: WorkerConfig,
    recipes: Sequence[QuantRecipe | None],
    least: Need,
    available: int,
    where: str,
) -> str:
    model = config.model
    largest = max(model.sizes, key=lambda size: math.prod(parse_size(size)))
    remedies = []
    if len(recipes) > 1:
        remedies.append("serve fewer modes")
    if "quantizing" in least.transient or None in recipes:
        remedies.append("serve a packed mode without bf16 (python -m quant convert)")
    if "text encoder" in {*least.resident, *least.transient}:
        remedies.append('set text_encoder = "host" in [model]')
    if model.vae_tiling == "off" and "decoding" in least.transient:
        remedies.append('set vae_tiling = "on" in [model]')
    remedies.append("offer smaller sizes or fewer frames")
    return (
        f"{model.name} with {', '.join(mode.name for mode in config.modes)} at up to {largest} and "
        f"{model.max_frames} frames needs {least} on {where} which has {_gib(available)} GiB. "
        f"To make it fit, {', or '.join(remedies)}."
    )


def _gib(size: int) -> str:
    return f"{size / GIB:.1f}"
