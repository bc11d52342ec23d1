"""Decide whether a folder holds a Wan2.1 text-to-video pipeline, for all that open one.

Others of Wan's family have the same classes or shapes and would load: they would then fail in each
job, or make wrong videos. So they are refused by name before anything is read.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from quant.errors import WeightsError
from quant.weights.header import refuse_lfs_pointer
from quant.weights.layouts import (
    REPOSITORY,
    import_command,
    refuse_loose_weights,
    refuse_pointers,
)

COMPONENTS = ("transformer", "text_encoder", "vae", "tokenizer", "scheduler")
_PIPELINES = {
    "WanImageToVideoPipeline": "an image-to-video pipeline",
    "WanVideoToVideoPipeline": "a video-to-video pipeline",
    "WanVACEPipeline": "a VACE pipeline, which edits videos",
    "WanAnimatePipeline": "a pipeline that animates characters",
}
_TRANSFORMERS = {
    "WanVACETransformer3DModel": "a VACE transformer, which edits videos",
    "WanAnimateTransformer3DModel": "a transformer that animates characters",
}
_ORIGINAL_TASKS = {
    "i2v": "image-to-video",
    "flf2v": "first and last frame to video",
    "vace": "VACE",
    "ti2v": "Wan2.2 text and image to video",
    "s2v": "speech to video",
    "animate": "character animation",
}
"""What the original repositories' config.json calls its task, as `model_type`."""
_CHANNELS = 16  # of the latents of Wan2.1's VAE


def check_model_kind(folder: Path) -> None:
    """Refuse a folder that shows itself as something else than a Wan2.1 text-to-video pipeline.

    What is missing is left to the callers, which need different parts.

    Raises:
        WeightsError: says what the folder holds; or that one of its files is a Git LFS pointer, or
            cannot be read.
    """
    index_file = folder / "model_index.json"
    if not index_file.is_file():
        kind = _original_kind(folder)
        if kind is None:
            refuse_loose_weights(folder)
    else:
        for part in ("", *COMPONENTS):
            refuse_pointers(folder / part)
        index = read_object(index_file)
        kind = _pipeline_kind(folder, index)
        for part, find in (("transformer", _transformer_kind), ("vae", _vae_kind)):
            file = folder / part / "config.json"
            if kind is None and file.is_file():
                kind = find(file)
    if kind is not None:
        raise WeightsError(
            f"{folder} holds {kind}: only Wan2.1 text-to-video is served, a WanPipeline with one "
            f"transformer like {REPOSITORY}"
        )


def transformer_kind(names: set[str]) -> str | None:
    """Return what a transformer is if its tensors, in the original layout, are not text-to-video's.

    None is returned for tensors of text-to-video, and for unknown ones.
    """
    marks = {
        "vace_": "a VACE transformer, which edits videos",
        "img_emb.": "an image-to-video transformer",
        "face_adapter.": "a transformer that animates characters",
        "motion_encoder.": "a transformer that animates characters",
        "casual_audio_encoder.": "a speech-to-video transformer",
        "ref_conv.": "a transformer that takes reference images",
        "control_adapter.": "a transformer that takes camera paths",
    }
    for mark, kind in marks.items():
        found = next((name for name in sorted(names) if name.startswith(mark)), None)
        if found is not None:
            return f"{kind} ({found})"
    return None


def channels_kind(in_channels: Any, out_channels: Any) -> str | None:
    """Return what a transformer is if its channels are not those of text-to-video."""
    if in_channels == out_channels == 3 * _CHANNELS:
        return f"a transformer of Wan2.2 TI2V-5B ({in_channels} channels)"
    if in_channels != out_channels:
        return (
            f"an image-to-video transformer or another that takes more than noise (in_channels "
            f"{in_channels}, out_channels {out_channels})"
        )
    return None


def original_task(model_type: Any) -> str | None:
    """Return what an original repository's `model_type` means if it is not text-to-video."""
    if model_type in (None, "t2v"):
        return None
    return f"{_ORIGINAL_TASKS.get(str(model_type), 'another model')} (model_type {model_type!r})"


def _original_kind(folder: Path) -> str | None:
    """Return what a folder in the layout of an original repository is; None for text-to-video."""
    experts = [each.name for each in sorted(folder.glob("*_noise_model")) if each.is_dir()]
    if experts:
        return f"Wan2.2 with two experts ({', '.join(experts)})"
    config = folder / "config.json"
    return original_task(read_object(config).get("model_type")) if config.is_file() else None


def _pipeline_kind(folder: Path, index: dict[str, Any]) -> str | None:
    name = index.get("_class_name")
    if name != "WanPipeline":
        known = _PIPELINES.get(str(name))
        shown = f"a {name}" if name else "a pipeline without a _class_name"
        return shown + (f", {known}" if known else "")
    if _names(index, "transformer_2") or (folder / "transformer_2" / "config.json").is_file():
        return "a WanPipeline with two transformers (transformer_2), the two experts of Wan2.2"
    if index.get("boundary_ratio") is not None:
        return f"one of the two experts of Wan2.2 (boundary_ratio {index['boundary_ratio']})"
    if index.get("expand_timesteps"):
        return "Wan2.2 TI2V-5B (expand_timesteps), which makes videos from text and image"
    if _names(index, "image_encoder") or (folder / "image_encoder" / "config.json").is_file():
        return "an image-to-video pipeline (image_encoder)"
    return _class_kind(_names(index, "transformer"))


def _class_kind(name: str | None) -> str | None:
    if name is None or name == "WanTransformer3DModel":
        return None
    return _TRANSFORMERS.get(str(name), f"a transformer of the class {name}")


def _names(index: dict[str, Any], part: str) -> str | None:
    """Return the class that an index names for a component, None if it has none."""
    entry = index.get(part)
    if entry is None or (isinstance(entry, list) and entry and entry[-1] is None):
        return None
    return str(entry[-1]) if isinstance(entry, list) and entry else str(entry)


def _transformer_kind(file: Path) -> str | None:
    config = read_object(file)
    name = config.get("_class_name")
    if name == "WanModel":
        if (task := original_task(config.get("model_type"))) is not None:
            return f"a transformer for {task}"
        raise WeightsError(
            f"{file} is the configuration of Wan's original repository (WanModel): convert the "
            f"transformer with: {import_command(file.parent)}"
        )
    if (kind := _class_kind(name)) is not None:
        return kind
    if any(key.startswith("vace_") for key in config):
        return _TRANSFORMERS["WanVACETransformer3DModel"]
    for key in ("image_dim", "added_kv_proj_dim", "pos_embed_seq_len"):
        if config.get(key) is not None:
            return f"an image-to-video transformer ({key} {config[key]})"
    in_channels = config.get("in_channels", _CHANNELS)
    return channels_kind(in_channels, config.get("out_channels", _CHANNELS) or in_channels)


def _vae_kind(file: Path) -> str | None:
    config = read_object(file)
    if config.get("is_residual"):
        return "the VAE of Wan2.2 TI2V-5B (is_residual)"
    name = config.get("_class_name")
    if name not in (None, "AutoencoderKLWan"):
        return f"a VAE of the class {name}"
    return None


def read_object(file: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        WeightsError: the file cannot be read, is a Git LFS pointer, or holds no object.
    """
    try:
        data = file.read_bytes()
        refuse_lfs_pointer(file, data)
        values = json.loads(data.decode())
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{file} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise WeightsError(f"{file} cannot be read: it holds a {type(values).__name__}, no object")
    return values
