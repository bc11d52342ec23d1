"""Compute a model's memory before it is loaded, and decide where its components go.

Weights are added up from headers and configurations. Activations are estimated for the largest
offered size and number of frames:
- Denoising: 12 BF16 values of the transformer's width for each token. A diffusers forward of the
  14B on an H100 took 11.3 (3.5 GiB at 32,760 tokens); adding up live tensors gives 11.1. On other
  accelerators it is 14, for the rotation on an Ascend 910B in float32: live tensors add up to 13.5
  there (`benchmarks.speed.vector_traffic`). Quantized modes that are emulated, by configuration or
  on a device without FP8, take 16: activations are rounded in plain torch, in pieces. Modes that
  fall back later because kernels do not run are not known yet.
- Sparse attention: which blocks of tokens each head attends to (0.9 GiB at 1280x720x81).
- Weights that are held as codes and decoded for each product: the two largest products' weights in
  BF16, because the next one's are decoded while one multiplies (`quant.transformer.prefetch`). The
  two buffers stay between jobs.
- VAE: 237 bytes for each pixel and each of the decoder's base channels, in FP32: the 19.5 GiB that
  an H200 took at 1280x720. Live tensors of `worker.engine.vae_decoder` add up to 204, the same at
  480p and 720p. The rest is what a convolution's own copies of its largest input and output in
  another layout would take (19.4 GiB together). With tiling it is the bytes of
  one tile plus 3.5 times the whole video, which diffusers assembles from its tiles (added up: 3.3
  at 720p with 81 frames, less for smaller videos).
What cannot be known beforehand (the runtime's context, workspaces, fragmentation) must fit in the
reserve.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

import torch
from torch import nn

from jobs.geometry import parse_size, sequence_tokens
from quant import LoraSet, QuantRecipe
from quant.transformer.lora.merge import NO_LORAS
from quant.transformer.meta_model import (
    quantized_meta_model,
    shared_meta_model,
    shared_quantized_meta_model,
)
from quant.transformer.module_tree import share_except
from quant.transformer.weight_storage import WeightStorage, decoded_extra_bytes
from worker.config import LoraConfig, ModeConfig, WorkerConfig
from worker.device import Device
from worker.errors import ModelUnusable, TooLittleMemory
from worker.model_loader.memory_need import ModelBytes, Need, gib
from worker.model_loader.model_shape import ModelShape, read_model_shape

WIDTHS_PER_TOKEN = 12
WIDTHS_PER_TOKEN_ELSEWHERE = 14  # on accelerators without FP8
EMULATED_WIDTHS_PER_TOKEN = 16
CACHED_PER_TOKEN = 6  # what a step cache keeps at most, with guidance: 2.0 GB at 32,760 tokens
VAE_BYTES_PER_PX_AND_CHANNEL = 237
DECODED_AT_ONCE = 2  # the weights that one product reads, and those of the next
TILE_PX = 256 * 256
_ENCODER_PLACEMENTS = ("device", "encode", "host")  # the first that fits is taken


class PlannedDevice(Protocol):
    """What the plan has to know of a device; `worker.device.Device` says it of a real one."""

    @property
    def dtype(self) -> torch.dtype:
        """Return the type of the transformer's and the text encoder's weights."""

    @property
    def vae_dtype(self) -> torch.dtype:
        """Return the type of the VAE's weights and activations."""

    @property
    def emulates(self) -> bool:
        """Return whether quantized modes round activations in plain torch on an accelerator."""

    @property
    def multiplies_codes(self) -> bool:
        """Return whether the device multiplies HiFloat8 weights in 8 bits."""


@dataclass(frozen=True, slots=True)
class Placement:
    """The chosen place of the text encoder and mode of the VAE; resolved, never "auto".

    Attributes:
        text_encoder: "device", "host", or "encode": on the device only while it encodes.
        vae_tiling: whether the VAE decodes in tiles.
        weight_storage: of the quantized linears whose products are in BF16; others are packed.
        available_bytes: device memory for this process; None on the CPU.
    """

    text_encoder: str
    vae_tiling: bool
    need: Need
    available_bytes: int | None
    weight_storage: WeightStorage = "packed"

    def text_encoder_load_device(self, device: Device) -> torch.device:
        """Return where the text encoder is loaded: for "encode" too, which copies it, the host."""
        return device.torch_device if self.text_encoder == "device" else torch.device("cpu")

    def __str__(self) -> str:
        tiles = "in tiles" if self.vae_tiling else "whole"
        grid = ", weights decoded to BF16 once" if self.weight_storage == "bf16_grid" else ""
        return (
            f"text encoder: {self.text_encoder}, VAE decodes {tiles}{grid}, "
            f"at most {self.need} needed"
        )


def place_model(
    config: WorkerConfig,
    recipes: Sequence[QuantRecipe | None],
    device: PlannedDevice,
    available_bytes: int | None,
    shape: ModelShape | None = None,
    loras: Sequence[LoraSet] | None = None,
) -> Placement:
    """Choose the first placement that fits, or refuse the model; nothing has been loaded yet.

    Decoding whole comes before decoded weights, because tiles change the frames. Decoded weights
    come before the text encoder's place, because they make every step faster.

    Args:
        recipes: of the modes, in their order; None for BF16.
        available_bytes: device memory for this process; None on the CPU, where device and host are
            the same.
        shape: by default read from the configured folder.
        loras: of the modes, in their order; None if no mode has any.

    Raises:
        TooLittleMemory: names the whole sum, the available memory, and remedies.
        ModelUnusable, quant.QuantError: the model's files cannot be read.
    """
    size = measure_model(config, recipes, device, shape, loras)
    choices = [
        (text_encoder, tiled, storage)
        for tiled in _allowed(config.model.vae_tiling, {"off": False, "on": True})
        for storage in allowed_storages(config, recipes, device, available_bytes)
        for text_encoder in _allowed(
            config.model.text_encoder, {each: each for each in _ENCODER_PLACEMENTS}
        )
    ]
    for text_encoder, tiled, storage in choices:
        need = size.need(text_encoder, tiled, storage)
        if available_bytes is None or need.total <= available_bytes:
            return Placement(text_encoder, tiled, need, available_bytes, storage)
    assert available_bytes is not None, "without a limit the first choice fits"
    least = min((size.need(*choice) for choice in choices), key=lambda need: need.total)
    raise TooLittleMemory(_refusal(config, recipes, least, available_bytes, "the device,"))


def check_follower(
    config: WorkerConfig,
    recipes: Sequence[QuantRecipe | None],
    device: Device,
    available_bytes: int | None,
    loras: Sequence[LoraSet] | None = None,
) -> WeightStorage:
    """Choose how a follower holds weights, or refuse it; arguments as in `place_model`.

    Raises:
        TooLittleMemory: names the whole sum, the available memory, and remedies.
        ModelUnusable, quant.QuantError: the model's files cannot be read.
    """
    size = measure_model(config, recipes, device, loras=loras)
    storages = allowed_storages(config, recipes, device, available_bytes)
    needs = {storage: size.follower_need(storage) for storage in storages}
    for storage, need in needs.items():
        if available_bytes is None or need.total <= available_bytes:
            return storage
    assert available_bytes is not None, "without a limit the first choice fits"
    least = min(needs.values(), key=lambda need: need.total)
    where = f"device {device.index}, which denoises with the first,"
    raise TooLittleMemory(_refusal(config, recipes, least, available_bytes, where))


def allowed_storages(
    config: WorkerConfig,
    recipes: Sequence[QuantRecipe | None],
    device: PlannedDevice,
    available_bytes: int | None,
) -> list[WeightStorage]:
    """Return the storages of weights to try, the best first.

    By default weights are decoded once only where no mode needs the memory for BF16 weights, and
    where the memory is known.

    Raises:
        ModelUnusable: weights are to be decoded once, and no mode would ever read them.
    """
    reads_decoded = any(
        multiplies_decoded(mode, recipe, device)
        for mode, recipe in zip(config.modes, recipes, strict=True)
    )
    match config.model.weight_storage:
        case "packed":
            return ["packed"]
        case "bf16_grid" if reads_decoded:
            return ["bf16_grid"]
        case "bf16_grid":
            raise ModelUnusable(
                f'{config.model.name} is to be served with weight_storage = "bf16_grid", which is '
                "for HiFloat8 modes whose products are in BF16, and none of "
                f"{', '.join(mode.name for mode in config.modes)} has such products on this "
                'device: leave weight_storage out of [model], or set it to "packed".'
            )
    if reads_decoded and None not in recipes and available_bytes is not None:
        return ["bf16_grid", "packed"]
    return ["packed"]


def multiplies_decoded(mode: ModeConfig, recipe: QuantRecipe | None, device: PlannedDevice) -> bool:
    """Return whether a mode's HiFloat8 weights are multiplied as BF16 numbers on a device."""
    if recipe is None or recipe.format != "hif8":
        return False
    return mode.exact_emulation or not device.multiplies_codes


def measure_model(
    config: WorkerConfig,
    recipes: Sequence[QuantRecipe | None],
    device: PlannedDevice,
    shape: ModelShape | None = None,
    loras: Sequence[LoraSet] | None = None,
) -> ModelBytes:
    """Add up a model's weights from configurations and headers, and estimate its activations.

    Args:
        shape: by default read from the configured folder.
        loras: of the modes, in their order; None if no mode has any.

    Raises:
        ModelUnusable, quant.QuantError: the model's files cannot be read.
    """
    shape = shape or read_model_shape(config.model.path)
    transformer = shape.transformer
    base = shared_meta_model(transformer, device.dtype)
    # Recipes of equal weights differ in their attention only.
    distinct = {
        mode.weights_key: (mode, recipe) for mode, recipe in zip(config.modes, recipes, strict=True)
    }.values()
    bases = _bases(config, base, loras)
    trees: list[nn.Module] = []
    for mode, recipe in distinct:
        own = bases[mode.lora]
        if recipe is None:
            trees.append(own)
        elif own is base:
            trees.append(shared_quantized_meta_model(transformer, recipe, device.dtype))
        else:
            trees.append(quantized_meta_model(own, recipe))
    decoded = [
        tree
        for tree, (mode, recipe) in zip(trees, distinct, strict=True)
        if multiplies_decoded(mode, recipe, device)
    ]
    emulates = any(_emulates(mode, recipe, device) for mode, recipe in distinct)
    from_bf16 = [bases[mode.lora] for mode, _ in distinct if mode.packed is None]
    loading = [base, *from_bf16] if len(distinct) > 1 and from_bf16 else []
    width, height = max(map(parse_size, config.model.sizes), key=math.prod)
    pixels = width * height
    tokens = sequence_tokens(width, height, config.model.max_frames)
    per_px = VAE_BYTES_PER_PX_AND_CHANNEL * shape.vae_channels * device.vae_dtype.itemsize // 4
    video = pixels * 3 * config.model.max_frames * device.vae_dtype.itemsize
    return ModelBytes(
        transformer=_tree_bytes(trees),
        transformer_loading=_tree_bytes([*trees, *loading]),
        text_encoder=shape.text_encoder * device.dtype.itemsize,
        vae=shape.vae * device.vae_dtype.itemsize,
        denoising=_denoising_bytes(config, tokens, base.config, device, emulates)
        + max(_kept_blocks_bytes(recipe, tokens, base.config) for recipe in recipes),
        decoding=pixels * per_px,
        decoding_tiled=min(pixels, TILE_PX) * per_px + 7 * video // 2,
        decoded_extra=sum(map(decoded_extra_bytes, decoded)),
        decoded_at_once=_decoded_at_once(base.config) if decoded and emulates else 0,
    )


def _bases(
    config: WorkerConfig, base: nn.Module, loras: Sequence[LoraSet] | None
) -> dict[tuple[LoraConfig, ...], nn.Module]:
    """Return the BF16 trees whose tensors modes share, by their LoRAs, as the loader makes them."""
    assert loras is not None or not any(mode.lora for mode in config.modes), "modes have LoRAs"
    given = loras or [NO_LORAS] * len(config.modes)
    names = {mode.lora: own.names for mode, own in zip(config.modes, given, strict=True)}
    return {
        key: share_except(base, own) if own and len(names) > 1 else base
        for key, own in names.items()
    }


def _emulates(mode: ModeConfig, recipe: QuantRecipe | None, device: PlannedDevice) -> bool:
    """Return whether a mode rounds to HiFloat8 in plain torch; INT8 is rounded in small pieces."""
    if recipe is None or recipe.format != "hif8":
        return False
    return mode.exact_emulation or device.emulates


def _decoded_at_once(transformer: Any) -> int:
    """Return the bytes of the weights that are decoded at a time: q, k and v, or feed-forward."""
    width = transformer.num_attention_heads * transformer.attention_head_dim
    largest = width * max(3 * width, transformer.ffn_dim)
    return int(DECODED_AT_ONCE * largest * torch.bfloat16.itemsize)


def _denoising_bytes(
    config: WorkerConfig, tokens: int, transformer: Any, device: PlannedDevice, emulates: bool
) -> int:
    widths = WIDTHS_PER_TOKEN_ELSEWHERE if device.emulates else WIDTHS_PER_TOKEN
    if emulates:
        widths = EMULATED_WIDTHS_PER_TOKEN
    if any(mode.step_cache is not None for mode in config.modes):
        widths += CACHED_PER_TOKEN
    # Blocks cache keys and values of the prompt and the negative prompt.
    prompts = 2 * 2 * config.model.text_tokens * transformer.num_layers
    width = transformer.num_attention_heads * transformer.attention_head_dim
    return int((tokens * widths + prompts) * width * torch.bfloat16.itemsize)


def _kept_blocks_bytes(recipe: QuantRecipe | None, tokens: int, transformer: Any) -> int:
    """Return the bytes that sparse attention keeps between steps: a bool for two blocks of tokens.

    Each head of each sparse block of the transformer has its choice, with the prompt and without.
    """
    if recipe is None or recipe.sparse is None:
        return 0
    choices = 2 * len(recipe.quantized_blocks) * transformer.num_attention_heads
    return int(choices * math.ceil(tokens / recipe.sparse.block) ** 2)


def _tree_bytes(trees: Iterable[nn.Module]) -> int:
    """Add up module trees on the meta device, where shared tensors are the same objects."""
    tensors = chain.from_iterable((*tree.parameters(), *tree.buffers()) for tree in trees)
    return sum({id(tensor): tensor.nbytes for tensor in tensors}.values())


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
    if model.weight_storage == "bf16_grid":
        remedies.append('set weight_storage = "packed" in [model]')
    if model.vae_tiling == "off" and "decoding" in least.transient:
        remedies.append('set vae_tiling = "on" in [model]')
    remedies.append("offer smaller sizes or fewer frames")
    return (
        f"{model.name} with {', '.join(mode.name for mode in config.modes)} at up to {largest} and "
        f"{model.max_frames} frames needs {least} on {where} which has {gib(available)} GiB. "
        f"To make it fit, {', or '.join(remedies)}."
    )
