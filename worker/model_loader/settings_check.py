"""Refuse settings of a model's folder that contradict each other or that nothing would use.

The parts of a folder are loaded one by one, each from its own configuration. So parts of different
models load without an error, and what one file says may never reach what another one describes.
Tensors are checked against their part's configuration elsewhere, where they are read.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import diffusers
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from transformers import UMT5Config

from jobs.geometry import FRAME_STRIDE, SIZE_MULTIPLE_PX, latent_frames, parse_size
from worker.config import ModelConfig
from worker.errors import ModelUnusable
from worker.model_loader.component_files import read_json
from worker.model_loader.components import Components

PATCH: Final = (1, 2, 2)
"""The patch of latent frames, rows and columns in one token, as `jobs.geometry` counts them."""

COLOURS: Final = 3

_FILES: Final = {
    "index": "model_index.json",
    "transformer": "transformer/config.json",
    "vae": "vae/config.json",
    "text_encoder": "text_encoder/config.json",
    "scheduler": "scheduler/scheduler_config.json",
}

_CLASSES: Final = {
    "transformer": ("diffusers", "WanTransformer3DModel"),
    "vae": ("diffusers", "AutoencoderKLWan"),
    "text_encoder": ("transformers", "UMT5EncoderModel"),
}

_ONLY_IN_WAN22: Final = ("expand_timesteps", "boundary_ratio")
"""Settings of the index that change how a pipeline denoises, and that Wan2.1 does not have."""


@dataclass(frozen=True, slots=True)
class _Said:
    """A setting and where it stands."""

    what: str
    value: object


def check_settings(model: ModelConfig) -> None:
    """Refuse the model's folder if its settings do not fit each other or the configuration.

    Raises:
        ModelUnusable: names both settings with their values, or the one that would be ignored.
    """
    files = {part: _read(model.path / name) for part, name in _FILES.items()}
    try:
        _check_classes(files)
        _check_ignored(files)
        settings = _with_defaults(files)
        for one, other in _equal_settings(settings):
            if one.value != other.value:
                raise _contradiction(one, other)
        _check_statistics(settings["vae"])
        _check_rotary(model, settings["transformer"])
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise ModelUnusable(f"The settings in {model.path} cannot be read: {error!r}") from error


def check_vocabulary(components: Components) -> None:
    """Refuse a tokenizer with tokens that the text encoder has no embedding for.

    Raises:
        ModelUnusable: names both numbers.
    """
    tokens = components.tokenizer.tokenize.backend_tokenizer.get_vocab_size(with_added_tokens=True)
    rows = components.text_encoder.config.vocab_size
    if tokens > rows:
        raise _contradiction(
            _Said("the number of tokens in tokenizer/tokenizer.json", tokens),
            _Said("vocab_size in text_encoder/config.json", rows),
        )


def _read(file: Path) -> dict[str, Any]:
    try:
        values = read_json(file)
        if not isinstance(values, dict):
            raise ValueError("it holds no JSON object")
    except (OSError, ValueError) as error:
        raise ModelUnusable(f"The model file {file} cannot be read: {error}") from error
    return values


def _contradiction(one: _Said, other: _Said) -> ModelUnusable:
    return ModelUnusable(
        f"{one.what} is {one.value!r}, but {other.what} is {other.value!r}: give the worker a "
        "folder whose parts are of one model."
    )


def _check_classes(files: Mapping[str, Mapping[str, Any]]) -> None:
    """Compare what the index, each part's own file and this worker take a part for."""
    for part in ("transformer", "vae", "text_encoder", "scheduler"):
        library, name = files["index"][part]
        expected = _CLASSES.get(part, ("diffusers", name))
        in_index = _Said(f"{part} in model_index.json", f"{library}.{name}")
        if (library, name) != expected:
            raise _contradiction(in_index, _Said("what this worker runs", ".".join(expected)))
        own = files[part].get("_class_name", name)
        if own != name:
            raise _contradiction(in_index, _Said(f"_class_name in {_FILES[part]}", own))
    encoder = files["text_encoder"]
    for key, values in (
        ("model_type", [encoder.get("model_type", "umt5")]),
        ("architectures", encoder.get("architectures") or []),
    ):
        # Any UMT5 has the encoder's tensors under the same names.
        for value in values:
            if not str(value).lower().startswith("umt5"):
                raise _contradiction(
                    _Said("text_encoder in model_index.json", "transformers.UMT5EncoderModel"),
                    _Said(f"{key} in text_encoder/config.json", value),
                )


def _check_ignored(files: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse settings that diffusers would ignore, such as a misspelt or a foreign one."""
    for name in _ONLY_IN_WAN22:
        if files["index"].get(name):
            raise ModelUnusable(
                f"model_index.json sets {name} to {files['index'][name]!r}, as only Wan2.2 does: "
                "this worker runs Wan2.1 and would ignore it; give it a folder of Wan2.1."
            )
    for part in ("transformer", "vae", "scheduler"):
        name = files["index"][part][1]
        known = inspect.signature(getattr(diffusers, name).__init__).parameters
        for key, value in files[part].items():
            # Newer versions of diffusers write settings that are off where they change nothing.
            off = value is None or value is False or value in ([], {})
            if not (key in known or key.startswith("_") or off):
                raise ModelUnusable(
                    f"{_FILES[part]} sets {key} to {value!r}, which {name} of diffusers "
                    f"{diffusers.__version__} would ignore: correct its name, or take it out."
                )


def _with_defaults(files: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Add the values that diffusers and transformers take for settings that a file leaves out."""
    settings = {}
    for part, kind in (("transformer", WanTransformer3DModel), ("vae", AutoencoderKLWan)):
        known = inspect.signature(kind.__init__).parameters
        defaults = {name: each.default for name, each in known.items() if name != "self"}
        settings[part] = defaults | dict(files[part])
    settings["text_encoder"] = {"d_model": UMT5Config().d_model} | dict(files["text_encoder"])
    return settings


def _equal_settings(settings: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[_Said, _Said]]:
    """Iterate over the pairs of settings that must be equal."""
    transformer, vae, encoder = (settings[part] for part in ("transformer", "vae", "text_encoder"))
    channels = _Said("z_dim in vae/config.json", vae["z_dim"])
    in_channels = transformer["in_channels"]
    yield _Said("in_channels in transformer/config.json", in_channels), channels
    out_channels = transformer["out_channels"] or in_channels
    yield _Said("out_channels in transformer/config.json", out_channels), channels
    for name in ("latents_mean", "latents_std"):
        yield _Said(f"the number of {name} in vae/config.json", len(vae[name])), channels
    yield (
        _Said("text_dim in transformer/config.json", transformer["text_dim"]),
        _Said("d_model in text_encoder/config.json", encoder["d_model"]),
    )
    yield (
        _Said("patch_size in transformer/config.json", tuple(transformer["patch_size"])),
        _Said("the patch that this service counts tokens by", PATCH),
    )
    yield from _equal_in_vae(vae)


def _equal_in_vae(vae: Mapping[str, Any]) -> Iterator[tuple[_Said, _Said]]:
    """Iterate over the pairs that make the VAE's frames those of the request."""
    yield (
        _Said("patch_size in vae/config.json", vae["patch_size"]),
        _Said("what this worker decodes", None),
    )
    yield (
        _Said("out_channels in vae/config.json", vae["out_channels"]),
        _Said("the number of a frame's colours", COLOURS),
    )
    described = 2 ** (len(vae["dim_mult"]) - 1), 2 ** sum(map(bool, vae["temperal_downsample"]))
    served = SIZE_MULTIPLE_PX // PATCH[1], FRAME_STRIDE
    sources = ("dim_mult", "temperal_downsample")
    for name, source, factor, stride in zip(
        ("scale_factor_spatial", "scale_factor_temporal"), sources, described, served, strict=True
    ):
        scale = _Said(f"{name} in vae/config.json", vae[name])
        yield scale, _Said(f"the factor of {source} there", factor)
        yield scale, _Said("the factor of this service's requests", stride)


def _check_statistics(vae: Mapping[str, Any]) -> None:
    """Refuse numbers that would make latents constant, mirrored or not finite."""
    for name, least in (("latents_mean", -math.inf), ("latents_std", 0.0)):
        for channel, value in enumerate(vae[name]):
            if not least < value < math.inf:
                raise ModelUnusable(
                    f"{name} in vae/config.json is {value} for channel {channel}, not a finite "
                    f"number{' above 0' if least == 0.0 else ''}: copy the file again."
                )


def _check_rotary(model: ModelConfig, transformer: Mapping[str, Any]) -> None:
    """Refuse offers that have more positions than the transformer's rotary embedding."""
    most, last = transformer["rope_max_seq_len"], latent_frames(model.max_frames)
    offers = {f"max_frames = {model.max_frames}": last}
    for size in model.sizes:
        offers[f"the size {size}"] = max(parse_size(size)) // SIZE_MULTIPLE_PX
    for offer, positions in offers.items():
        if positions > most:
            raise ModelUnusable(
                f"{offer} in the worker's configuration takes {positions} positions, but "
                f"rope_max_seq_len in transformer/config.json is {most}: offer less."
            )
