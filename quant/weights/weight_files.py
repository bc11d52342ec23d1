"""Find the weights of a component's folder, as the libraries that load such folders do.

In this order:
- the files that an index (`*.safetensors.index.json`) names. Files beside them, as of another
  split, are not read: a shared cache cannot be tidied.
- the one file with the libraries' own name, `diffusion_pytorch_model.safetensors` or
  `model.safetensors`;
- otherwise all safetensors files.

Hidden files are skipped: macOS and network shares put some beside the others (`._x.safetensors`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from quant.errors import WeightsError
from quant.weights.header import (
    StoredTensor,
    read_header,
    refuse_lfs_pointer,
    tensors_by_name,
)

INDEX_SUFFIX = ".safetensors.index.json"
STEMS = ("diffusion_pytorch_model", "model")
"""How diffusers and transformers name files of weights; with an index, too."""
EMBEDDING = "shared.weight"
TIED_EMBEDDING = "encoder.embed_tokens.weight"
_HARMLESS = {
    # State of modules of other libraries (Transformer Engine), which holds no weights.
    "": re.compile(r"(.+\.)?_extra_state"),
    # Rotary frequencies, which older versions stored; they are computed from the configuration.
    "transformer": re.compile(r"rope\.freqs(_cos|_sin)?"),
    # The other half of an encoder-decoder, and the tokenizer that ComfyUI packs beside the encoder.
    "text_encoder": re.compile(r"decoder\..+|lm_head\.weight|spiece_model"),
}
"""Tensors that no model reads, by component, with the reason; all others have to have a place."""


def visible(files: Iterable[Path]) -> list[Path]:
    """Return the files without hidden ones, sorted by name."""
    return sorted(file for file in files if not file.name.startswith("."))


def weight_files(folder: Path) -> list[Path]:
    """Return the files of weights that belong to a component's folder, sorted; maybe none.

    Raises:
        WeightsError: an index cannot be read, or names a file that is missing; or several indices
            contradict each other.
    """
    index = _read_index(folder)
    if index is not None:
        return visible({folder / name for name in index.values()})
    for stem in STEMS:
        if (folder / f"{stem}.safetensors").is_file():
            return [folder / f"{stem}.safetensors"]
    return visible(folder.glob("*.safetensors"))


def stored_weights(folder: Path) -> dict[str, StoredTensor]:
    """Return a component's stored tensors by name, without those that no model reads.

    A text encoder's embedding may be stored under both of its names. The one that computes is kept,
    as transformers does.

    Args:
        folder: its name says which component it is: transformer, text_encoder or vae.

    Raises:
        WeightsError: a file or an index cannot be read; or files without an index have a tensor of
            one name.
    """
    found = folder_tensors(folder)
    if folder.name == "text_encoder" and TIED_EMBEDDING in found:
        found.pop(EMBEDDING, None)
    return {name: each for name, each in found.items() if not _is_harmless(folder.name, name)}


def folder_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Return all tensors in a folder's files of weights by name; a tensor in two as its index says.

    Raises:
        WeightsError: a file or an index cannot be read; or files without an index have a tensor of
            one name.
    """
    headers = [read_header(file) for file in weight_files(folder)]
    index = _read_index(folder)
    if index is None:
        found = tensors_by_name(headers)
    else:
        tensors = [each for header in headers for each in header.tensors]
        found = {each.name: each for each in tensors}
        found |= {each.name: each for each in tensors if index.get(each.name) == each.file.name}
    return found


def _is_harmless(component: str, name: str) -> bool:
    patterns = (_HARMLESS[""], _HARMLESS.get(component))
    return any(pattern.fullmatch(name) for pattern in patterns if pattern is not None)


def _read_index(folder: Path) -> dict[str, str] | None:
    """Return which file of a folder holds which tensor, by its index; None without one."""
    files = visible(folder.glob(f"*{INDEX_SUFFIX}"))
    if not files:
        return None
    named = [folder / f"{stem}{INDEX_SUFFIX}" for stem in STEMS]
    chosen = next((file for file in named if file in files), files[0])
    if len(files) > 1 and chosen not in named:
        raise WeightsError(
            f"{folder} has the indices {', '.join(file.name for file in files)}, and none has a "
            f"name that the libraries read: rename one to {named[0].name}"
        )
    if chosen.name == f"model{INDEX_SUFFIX}" and (folder / "model.safetensors").is_file():
        return None  # transformers prefers the one file, unlike diffusers
    names = dict(_entries(chosen))
    missing = sorted({name for name in names.values() if not (folder / name).is_file()})
    # Without any file the folder has no weights, which packed modes do not need.
    if missing and visible(folder.glob("*.safetensors")):
        raise WeightsError(
            f"{folder} lacks {missing[0]}{_others(len(missing) - 1)} that {chosen.name} names: "
            "download or copy the folder again"
        )
    return None if missing else names


def _entries(file: Path) -> Iterator[tuple[str, str]]:
    try:
        data = file.read_bytes()
        refuse_lfs_pointer(file, data)
        values: Any = json.loads(data.decode())["weight_map"]
        for tensor, name in values.items():
            if not isinstance(name, str) or Path(name).name != name or name.startswith("."):
                raise ValueError(f"{name!r} is no file of its folder")
            yield tensor, name
        if not values:
            raise ValueError("its weight_map is empty")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise WeightsError(
            f"{file} cannot be read as an index of weights: {error}; download it again"
        ) from error


def _others(count: int) -> str:
    return f" and {count} other files" if count else ""
