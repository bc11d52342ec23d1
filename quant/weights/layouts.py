"""Recognize layouts of weights that are not the libraries', and say how to convert them.

Wan's authors and ComfyUI name the same tensors in other ways than diffusers does. Their files are
refused with the name of the layout and the command that converts it.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Iterable
from pathlib import Path

from quant.errors import WeightsError
from quant.weights.header import read_header, refuse_lfs_pointer
from quant.weights.weight_files import visible

REPOSITORY = "Wan-AI/Wan2.1-T2V-14B-Diffusers"
COMFY_PREFIX = "model.diffusion_model."
PREFIXES = (COMFY_PREFIX, "diffusion_model.")
"""What ComfyUI and its relatives put in front of the original names."""
_ORIGINAL = re.compile(r"blocks\.\d+\.self_attn\..+|text_embedding\.0\..+|head\.head\..+")
_LORA = re.compile(r".*(\.lora_[AB]\.|lora_(down|up)\.).*|.*\.diff(_b)?")
_SCALED_FP8 = re.compile(r"(.*\.)?(scaled_fp8|scale_weight|weight_scale|scale_input|input_scale)")
_ORIGINAL_VAE = re.compile(r"decoder\.middle\.0\.residual\.0\.gamma")
_ORIGINAL_ENCODER = re.compile(r"token_embedding\.weight|blocks\.\d+\.attn\.q\.weight")
_PICKLES = (".bin", ".pth", ".pt", ".ckpt")
_MAX_POINTER_BYTES = 1024
_MODEL_CLASSES = {
    "transformer": ("diffusers", "WanTransformer3DModel"),
    "text_encoder": ("transformers", "UMT5EncoderModel"),
    "vae": ("diffusers", "AutoencoderKLWan"),
}


def import_command(source: Path, out: str = "NEW_FOLDER") -> str:
    """Return the command that converts a transformer from the original layout."""
    return f"python -m quant import --from {shlex.quote(str(source))} --out {out}"


def refuse_other_layout(names: Collection[str], source: Path) -> None:
    """Refuse tensors whose names show a known layout other than the libraries'.

    Raises:
        WeightsError: names the layout, and the command that converts it or what to take instead.
    """
    found = _layout(names, source)
    if found is not None:
        raise WeightsError(f"{source} {found}")


def _layout(names: Collection[str], source: Path) -> str | None:
    if lora := _first(_LORA, names):
        return (
            f"holds a LoRA ({lora}), which is not served alone: give a whole model, and name the "
            "LoRA in a mode's lora, or by --lora"
        )
    if scale := _first(_SCALED_FP8, names):
        return (
            f"holds weights in 8 bits with scales of their own ({scale}), which are not read here: "
            "take the model in BF16, F16 or F32"
        )
    for prefix in PREFIXES:
        plain = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
        if original := _first(_ORIGINAL, plain):
            return (
                f"has ComfyUI's layout ({prefix}{original}): convert it with: "
                f"{import_command(source)}"
            )
    if original := _first(_ORIGINAL, names):
        return (
            f"has the layout of Wan's original repository ({original}): convert it with: "
            f"{import_command(source)}"
        )
    for kind, pattern in (("VAE", _ORIGINAL_VAE), ("text encoder", _ORIGINAL_ENCODER)):
        if original := _first(pattern, names):
            return (
                f"holds the {kind} in the layout of Wan's original repository ({original}): take "
                f"the folder {'vae' if kind == 'VAE' else 'text_encoder'} of {REPOSITORY}"
            )
    return None


def _first(pattern: re.Pattern[str], names: Iterable[str]) -> str | None:
    return next((name for name in names if pattern.fullmatch(name)), None)


def refuse_pointers(folder: Path) -> None:
    """Refuse a folder in which a file is only a Git LFS pointer; nothing happens without a folder.

    Raises:
        WeightsError: names the file and the command that gets it.
    """
    for file in visible(folder.glob("*")):
        if file.is_file() and file.stat().st_size < _MAX_POINTER_BYTES:
            refuse_lfs_pointer(file, file.read_bytes())


def refuse_other_forms(folder: Path) -> None:
    """Refuse a component's folder that holds its weights or tokenizer in another form only.

    Raises:
        WeightsError: names the file, and the command that converts it.
    """
    files = [file for file in visible(folder.glob("*")) if file.is_file()]
    if folder.name == "tokenizer" and any(file.name == "spiece.model" for file in files):
        raise WeightsError(
            f"{folder} holds its tokenizer as a SentencePiece model only (spiece.model), and "
            f"tokenizer.json is needed: take it from {REPOSITORY}, or make it (after: pip install "
            "sentencepiece protobuf) with: "
            + _save_command("transformers", "AutoTokenizer", folder)
        )
    pickle = next((file.name for file in files if file.suffix in _PICKLES), None)
    if folder.name in _MODEL_CLASSES and pickle is not None:
        raise WeightsError(
            f"{folder} holds its weights as a pickle only ({pickle}), which is not read, as it may "
            f"run code: convert it with: {_save_command(*_MODEL_CLASSES[folder.name], folder)}"
        )


def _save_command(library: str, loader: str, folder: Path) -> str:
    code = f"from {library} import {loader} as M; f = {str(folder)!r}; "
    return f"python -c {shlex.quote(code + 'M.from_pretrained(f).save_pretrained(f)')}"


def refuse_loose_weights(path: Path) -> None:
    """Refuse a path that holds no pipeline but weights in a layout of their own.

    Args:
        path: a file of weights, or a folder without model_index.json.

    Raises:
        WeightsError: names the layout, and the command that converts it or what to take instead.
    """
    files = [path] if path.is_file() else visible(path.glob("*")) if path.is_dir() else []
    for file in files:
        if file.suffix == ".safetensors" and file.is_file():
            names = [each.name for each in read_header(file).tensors]
            refuse_other_layout(names, path)
    for file in files:
        if file.suffix in (*_PICKLES, ".gguf"):
            raise WeightsError(
                f"{file} is not read here: give a pipeline's folder in diffusers format, like "
                f"{REPOSITORY}"
            )
