"""What a model will take on a device, before anything of it is loaded; and what then stays where.

Weights are added up from headers and configurations. Activations are estimated for the largest size
and number of frames on offer:
- Denoising: 12 BF16 values of the transformer's width for each token. A diffusers forward of the
  14B on an H100 took 11.3 (3.5 GiB at 32,760 tokens); adding up live tensors gives 11.1. Quantized
  modes that are emulated, as they were asked for or on a card without FP8, take 16: activations are
  rounded in plain torch, in pieces. What falls back later, since kernels do not run, is not known.
- VAE: 204 bytes for each pixel and each of the decoder's base channels, in FP32: live tensors of
  `worker.engine.vae_decoder` added up, the same at 480p and 720p. With tiling it is a tile's, and
  three and a half times the whole video, which diffusers puts together from its tiles (added up:
  3.3 at 720p with 81 frames, less for smaller ones).
Whatever cannot be known beforehand (the runtime's context, workspaces, fragments) has to fit into
the reserve.
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

from quant import QuantRecipe
from quant.transformer.meta_model import shared_meta_model, shared_quantized_skeleton
from quant.weights.fingerprint import read_transformer_config
from quant.weights.header import stored_tensors
from worker.config import WorkerConfig, split_size
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
_TOKEN_PX = 16 * 16
_PLACES = ("device", "encode", "host")  # the first that fits is taken


@dataclass(frozen=True, slots=True)
class Need:
    """What one choice takes at most. All in bytes; what never is there at once is not added up.

    Attributes:
        resident: parts that stay on the device, by name.
        passing: what comes on top, by the stage that needs it; the largest counts.
    """

    resident: dict[str, int]
    passing: dict[str, int]

    @property
    def total(self) -> int:
        """The most that is there at once."""
        return sum(self.resident.values()) + max(self.passing.values())

    def __str__(self) -> str:
        stays = ", ".join(f"{name} {_gib(size)}" for name, size in self.resident.items())
        comes = ", ".join(f"{name} {_gib(size)}" for name, size in self.passing.items())
        return f"{_gib(self.total)} GiB ({stays}, and the largest of: {comes})"


@dataclass(frozen=True, slots=True)
class Placement:
    """What stays where, resolved: never "auto".

    Attributes:
        text_encoder: "device", "host", or "encode": on the device only while it encodes.
        vae_tiling: whether the VAE decodes in tiles.
        available_bytes: what the device has; None where that does not count.
    """

    text_encoder: str
    vae_tiling: bool
    need: Need
    available_bytes: int | None

    def text_encoder_home(self, device: Device) -> torch.device:
        """Where the text encoder is loaded to; with "encode" it visits the device from there."""
        return device.torch_device if self.text_encoder == "device" else torch.device("cpu")

    def __str__(self) -> str:
        tiles = "in tiles" if self.vae_tiling else "whole"
        return f"text encoder: {self.text_encoder}, VAE decodes {tiles}, at most {self.need} needed"


@dataclass(frozen=True, slots=True)
class ModelBytes:
    """The parts of a model, and its activations at the largest size and number of frames.

    Attributes:
        transformer: of all modes together, what they share counted once.
        transformer_loading: while they are made; more where BF16 is there only to be quantized.
    """

    transformer: int
    transformer_loading: int
    text_encoder: int
    vae: int
    denoising: int
    decoding: int
    decoding_tiled: int

    def need(self, place: str, tiled: bool) -> Need:
        """What it takes with the text encoder at `place`."""
        decoding = self.decoding_tiled if tiled else self.decoding
        resident = {"transformer": self.transformer, "VAE": self.vae, "reserve": RESERVE_BYTES}
        passing = {
            "denoising": self.denoising,
            "decoding in tiles" if tiled else "decoding": decoding,
        }
        if place == "device":
            resident["text encoder"] = self.text_encoder
        elif place == "encode":
            passing["text encoder"] = self.text_encoder + ENCODING_BYTES
        return Need(resident, passing | self._quantizing)

    def followers_need(self) -> Need:
        """What it takes on a card that only denoises; with all tokens, as each of two cards has
        them with guidance."""
        resident = {"transformer": self.transformer, "reserve": RESERVE_BYTES}
        return Need(resident, {"denoising": self.denoising} | self._quantizing)

    @property
    def _quantizing(self) -> dict[str, int]:
        more = self.transformer_loading - self.transformer
        return {"quantizing": more} if more else {}


def place_model(
    config: WorkerConfig,
    recipes: Sequence[QuantRecipe | None],
    device: Device,
    available_bytes: int | None,
) -> Placement:
    """Decide what stays where, or refuse: nothing has been loaded yet.

    Args:
        recipes: of the modes, in their order; None for BF16.
        available_bytes: what the device has for this process; None on the CPU, where everything is
            in one place.

    Raises:
        TooLittleMemory: with the whole sum, what there is, and what would help.
        ModelUnusable, quant.QuantError: the model's files cannot be read.
    """
    size = measure_model(config, recipes, device)
    choices = [
        (place, tiled)
        for tiled in _allowed(config.model.vae_tiling, {"off": False, "on": True})
        for place in _allowed(config.model.text_encoder, {each: each for each in _PLACES})
    ]
    for place, tiled in choices:
        need = size.need(place, tiled)
        if available_bytes is None or need.total <= available_bytes:
            return Placement(place, tiled, need, available_bytes)
    assert available_bytes is not None, "without a bound the first choice fits"
    least = min((size.need(*choice) for choice in choices), key=lambda need: need.total)
    raise TooLittleMemory(_refusal(config, recipes, least, available_bytes, "the device,"))


def check_follower(
    config: WorkerConfig,
    recipes: Sequence[QuantRecipe | None],
    device: Device,
    available_bytes: int | None,
) -> None:
    """Refuse, as `place_model` does, for a card that follows another; `available_bytes` is its own.

    Raises:
        TooLittleMemory: with the whole sum, what there is, and what would help.
        ModelUnusable, quant.QuantError: the model's files cannot be read.
    """
    need = measure_model(config, recipes, device).followers_need()
    if available_bytes is not None and need.total > available_bytes:
        where = f"card {device.card}, which denoises with the first,"
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
        mode.made_with: (mode, recipe) for mode, recipe in zip(config.modes, recipes, strict=True)
    }.values()
    trees: list[nn.Module] = [
        base if recipe is None else shared_quantized_skeleton(transformer, recipe, device.dtype)
        for _, recipe in distinct
    ]
    made_of_bf16 = len(distinct) > 1 and any(mode.packed is None for mode, _ in distinct)
    pixels = max(width * height for width, height in map(split_size, config.model.sizes))
    per_px = VAE_BYTES_PER_PX_AND_CHANNEL * _vae_channels(folder) * device.vae_dtype.itemsize // 4
    video = pixels * 3 * config.model.max_frames * device.vae_dtype.itemsize
    return ModelBytes(
        transformer=_tree_bytes(trees),
        transformer_loading=_tree_bytes([*trees, base] if made_of_bf16 else trees),
        text_encoder=_part_bytes(folder / "text_encoder", device.dtype),
        vae=_part_bytes(folder / "vae", device.vae_dtype),
        denoising=_denoising_bytes(config, pixels, base.config, device),
        decoding=pixels * per_px,
        decoding_tiled=min(pixels, TILE_PX) * per_px + 7 * video // 2,
    )


def _denoising_bytes(config: WorkerConfig, pixels: int, transformer: Any, device: Device) -> int:
    tokens = (1 + (config.model.max_frames - 1) // 4) * math.ceil(pixels / _TOKEN_PX)
    quantized = [mode for mode in config.modes if mode.recipe is not None]
    emulated = any(mode.exact_emulation or device.emulates for mode in quantized)
    widths = EMULATED_WIDTHS_PER_TOKEN if emulated else WIDTHS_PER_TOKEN
    if any(mode.step_cache is not None for mode in config.modes):
        widths += CACHED_PER_TOKEN
    # What blocks keep of the prompt and the negative one: keys and values.
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
    """What trees of the meta device will take: without storages, tensors tell what is shared."""
    tensors = chain.from_iterable((*tree.parameters(), *tree.buffers()) for tree in trees)
    return sum({id(tensor): tensor.nbytes for tensor in tensors}.values())


def _part_bytes(folder: Path, dtype: torch.dtype) -> int:
    """What a part takes in `dtype`, in whatever its files store it."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelUnusable(f"The model part {folder} lacks a file *.safetensors.")
    return sum(math.prod(each.shape) * dtype.itemsize for each in stored_tensors(files).values())


def _allowed(wanted: str, choices: dict[str, Any]) -> list[Any]:
    return list(choices.values()) if wanted == "auto" else [choices[wanted]]


def _refusal(
    config: WorkerConfig,
    recipes: Sequence[QuantRecipe | None],
    least: Need,
    available: int,
    where: str,
) -> str:
    model = config.model
    largest = max(model.sizes, key=lambda size: math.prod(split_size(size)))
    remedies = []
    if len(recipes) > 1:
        remedies.append("serve fewer modes")
    if "quantizing" in least.passing or None in recipes:
        remedies.append("serve a packed mode without bf16 (python -m quant convert)")
    if "text encoder" in {*least.resident, *least.passing}:
        remedies.append('set text_encoder = "host" in [model]')
    if model.vae_tiling == "off" and "decoding" in least.passing:
        remedies.append('set vae_tiling = "on" in [model]')
    remedies.append("offer smaller sizes or fewer frames")
    return (
        f"{model.name} with {', '.join(mode.name for mode in config.modes)} at up to {largest} and "
        f"{model.max_frames} frames needs {least} on {where} which has {_gib(available)} GiB. "
        f"To make it fit, {', or '.join(remedies)}."
    )


def _gib(size: int) -> str:
    return f"{size / GIB:.1f}"
