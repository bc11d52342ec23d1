"""Convert a Wan2.1 text-to-video transformer from its original or ComfyUI's layout to diffusers'.

Wan's authors write `blocks.0.self_attn.q.weight` where diffusers has `blocks.0.attn1.to_q.weight`.
ComfyUI keeps these names behind a prefix. The tensors are equal, so only names change: they are
copied one by one, so that memory has to hold the largest only. The new folder appears complete or
not at all.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quant.errors import WeightsError
from quant.transformer.meta_model import check_stored, shared_meta_model
from quant.weights.header import StoredTensor, stored_tensors
from quant.weights.layouts import PREFIXES
from quant.weights.model_folder import channels_kind, original_task, transformer_kind
from quant.weights.new_folder import check_new_folder, check_room, new_folder
from quant.weights.reader import TensorReader
from quant.weights.weight_files import INDEX_SUFFIX, STEMS, folder_tensors
from quant.weights.writer import Spec, split_into_shards, write_safetensors

SHARD_BYTES = 5_000_000_000
OnTensor = Callable[[int, int], None]

_MODULES = {
    "patch_embedding": "patch_embedding",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.head": "proj_out",
}
_BLOCK_MODULES = {
    **{
        f"{theirs}.{name}": f"{ours}.{renamed}"
        for theirs, ours in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for name, renamed in (
            *(("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0")),
            *(("norm_q", "norm_q"), ("norm_k", "norm_k")),
        )
    },
    "norm3": "norm2",  # of the three norms only the one before cross-attention has weights
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}
_ORIGINAL_MODULES = {ours: theirs for theirs, ours in _MODULES.items()}
_ORIGINAL_BLOCK_MODULES = {ours: theirs for theirs, ours in _BLOCK_MODULES.items()}
_BLOCK = re.compile(r"(blocks\.\d+)\.(.+)")
_HEAD_WIDTHS = {1536: 12, 5120: 40}
"""Heads by width, of the 1.3B and 14B; shapes do not show them."""
_EPS = 1e-6  # of every Wan2.1
_WAN22 = re.compile(r"(high|low)_?noise|wan2[._]2", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class ImportReport:
    """What was written: counts of tensors and files, and bytes of all tensors."""

    tensors: int
    shards: int
    weight_bytes: int

    def __str__(self) -> str:
        files = "1 file" if self.shards == 1 else f"{self.shards} files"
        return f"{self.tensors} tensors in {files}, {self.weight_bytes:,} bytes"


def import_original(
    source: Path,
    out: Path,
    *,
    heads: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    on_tensor: OnTensor = lambda done, total: None,
) -> ImportReport:
    """Write the transformer in `source` into the new folder `out`, as diffusers saves it.

    Values and dtypes stay as they are. The configuration follows from the shapes, and from the
    config.json beside the weights what shapes do not show.

    Args:
        source: a safetensors file, or a folder of them.
        heads: the number of attention heads, if neither the width nor a config.json says it.
        on_tensor: called after each tensor with (done, total).

    Raises:
        WeightsError: `source` is no Wan2.1 text-to-video transformer in a known layout (the message
            names what is not known), or cannot be read; or `out` exists or cannot be written.
    """
    check_new_folder(out)
    stored = _renamed(_read_source(source), source)
    config = _deduced_config(stored, source, heads)
    required = shared_meta_model(config).state_dict()
    check_stored(required, stored, source=str(source), exact=False)
    weight_bytes = sum(each.nbytes for each in stored.values())
    check_room(out, weight_bytes)
    # In the order of diffusers' state dict.
    specs: list[Spec] = [(n, stored[n].dtype, stored[n].shape) for n in required]
    reader, done = TensorReader(torch.device("cpu")), 0

    def make(name: str) -> Tensor:
        nonlocal done
        tensor = torch.empty(stored[name].shape, dtype=stored[name].dtype)
        reader.read([(stored[name], tensor)])
        done += 1
        on_tensor(done, len(specs))
        return tensor

    shards = list(split_into_shards(specs, shard_bytes))
    try:
        with new_folder(out) as folder:
            _write(folder, shards, config, make)
    except OSError as error:
        raise WeightsError(f"cannot write {out}: {error.strerror or error}") from error
    return ImportReport(len(specs), len(shards), weight_bytes)


def diffusers_name(original: str) -> str | None:
    """Return diffusers' name of a tensor in the original layout; None if it is not known."""
    if original == "head.modulation":
        return "scale_shift_table"
    block = _BLOCK.fullmatch(original)
    scope, rest = (f"{block[1]}.", block[2]) if block else ("", original)
    if block and rest == "modulation":
        return f"{scope}scale_shift_table"
    module, _, kind = rest.rpartition(".")
    renamed = (_BLOCK_MODULES if block else _MODULES).get(module)
    return f"{scope}{renamed}.{kind}" if renamed and kind in ("weight", "bias") else None


def original_name(ours: str) -> str | None:
    """Return the original layout's name of a tensor that diffusers names so; None if unknown."""
    if ours == "scale_shift_table":
        return "head.modulation"
    block = _BLOCK.fullmatch(ours)
    scope, rest = (f"{block[1]}.", block[2]) if block else ("", ours)
    if block and rest == "scale_shift_table":
        return f"{scope}modulation"
    module, _, kind = rest.rpartition(".")
    renamed = (_ORIGINAL_BLOCK_MODULES if block else _ORIGINAL_MODULES).get(module)
    return f"{scope}{renamed}.{kind}" if renamed else None


def _read_source(source: Path) -> dict[str, StoredTensor]:
    """Read the headers of a source, and refuse what is not for this command."""
    found = _WAN22.search("/".join(source.absolute().parts[-2:]))
    if found:
        raise WeightsError(
            f"{source} is one of the two experts of Wan2.2 by its name ({found[0]}), which has the "
            "shapes of Wan2.1 and is not served: give a Wan2.1 text-to-video transformer"
        )
    if (source / "model_index.json").is_file():
        raise WeightsError(f"{source} is a pipeline in diffusers format already: use it as it is")
    tensors = stored_tensors([source]) if source.is_file() else folder_tensors(source)
    if not tensors:
        raise WeightsError(
            f"{source} is no safetensors file, nor a folder that holds some: give the original "
            "transformer's"
        )
    return tensors


def _renamed(tensors: Mapping[str, StoredTensor], source: Path) -> dict[str, StoredTensor]:
    """Return the tensors by their names in diffusers; refuse all that are not known."""
    prefix = next((each for each in PREFIXES if all(n.startswith(each) for n in tensors)), "")
    plain = {name.removeprefix(prefix): each for name, each in tensors.items()}
    if "scale_shift_table" in plain and "proj_out.weight" in plain:
        raise WeightsError(f"{source} is in diffusers' layout already: use it as it is")
    kind = transformer_kind(set(plain))
    if kind is not None:
        raise WeightsError(
            f"{source} is {kind}, which is not served: give a Wan2.1 text-to-video transformer"
        )
    renamed = {name: diffusers_name(name) for name in plain}
    unknown = [name for name, new in renamed.items() if new is None]
    if unknown:
        raise WeightsError(
            f"{source} holds tensor {unknown[0]!r}, and {len(unknown) - 1} others, that the "
            "original layout of a Wan2.1 text-to-video transformer does not have: give such a "
            "transformer alone"
        )
    return {new: plain[name] for name, new in renamed.items() if new is not None}


def _deduced_config(
    stored: Mapping[str, StoredTensor], source: Path, heads: int | None
) -> dict[str, Any]:
    """Deduce diffusers' configuration of a transformer from its tensors' shapes."""

    def shape(name: str, sides: int) -> tuple[int, ...]:
        found = stored.get(name)
        if found is None or len(found.shape) != sides or not all(found.shape):
            what = "lacks it" if found is None else f"has it with shape {list(found.shape)}"
            raise WeightsError(
                f"no configuration can be deduced without the tensor that diffusers calls {name}: "
                f"{source} {what}; give all files of a Wan2.1 text-to-video transformer"
            )
        return found.shape

    width, in_channels, *patch = shape("patch_embedding.weight", 5)
    out_channels = shape("proj_out.weight", 2)[0] // math.prod(patch)
    kind = channels_kind(in_channels, out_channels)
    if kind is not None:
        raise WeightsError(
            f"{source} is {kind}, which is not served: give a Wan2.1 text-to-video transformer"
        )
    blocks = {int(name.split(".")[1]) for name in stored if name.startswith("blocks.")}
    absent = sorted(set(range(len(blocks))) - blocks)
    if absent:
        raise WeightsError(
            f"{source} lacks block {absent[0]} of {len(blocks) + len(absent)}: give all files of "
            "the transformer"
        )
    deduced = {
        "num_layers": len(blocks),
        "ffn_dim": shape("blocks.0.ffn.net.0.proj.weight", 2)[0],
        "freq_dim": shape("condition_embedder.time_embedder.linear_1.weight", 2)[1],
        "in_channels": in_channels,
        "out_channels": out_channels,
        "text_dim": shape("condition_embedder.text_embedder.linear_1.weight", 2)[1],
    }
    found = _Beside.read(source, deduced | {"dim": width})
    return {
        "_class_name": "WanTransformer3DModel",
        **_heads(width, heads or found.heads, source),
        **deduced,
        "patch_size": patch,
        "cross_attn_norm": "blocks.0.norm2.weight" in stored,
        "qk_norm": "rms_norm_across_heads" if "blocks.0.attn1.norm_q.weight" in stored else None,
        "eps": found.eps,
        "image_dim": None,
        "added_kv_proj_dim": None,
        "rope_max_seq_len": 1024,
        "pos_embed_seq_len": None,
    }


@dataclass(frozen=True, slots=True)
class _Beside:
    """What the config.json beside the weights says that shapes do not show."""

    heads: int | None = None
    eps: float = _EPS

    @classmethod
    def read(cls, source: Path, deduced: Mapping[str, int]) -> _Beside:
        """Read it, and refuse one that contradicts the shapes or is of another task."""
        file = (source if source.is_dir() else source.parent) / "config.json"
        if not file.is_file():
            return cls()
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            heads = values.get("num_heads", values.get("num_attention_heads"))
            eps = float(values.get("eps", _EPS))
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise WeightsError(f"{file} cannot be read: {error}") from error
        if (task := original_task(values.get("model_type"))) is not None:
            raise WeightsError(
                f"{file} is of {task}, which is not served: give a Wan2.1 text-to-video transformer"
            )
        theirs = {"in_channels": "in_dim", "out_channels": "out_dim"}
        for key, value in deduced.items():
            said = values.get(key, values.get(theirs.get(key, key), value))
            if said is not None and said != value:
                raise WeightsError(
                    f"{file} says {key} {said}, and the tensors have {value}: take the config.json "
                    "that came with the weights, or remove it"
                )
        return cls(heads, eps)


def _heads(width: int, heads: int | None, source: Path) -> dict[str, int]:
    count = heads or _HEAD_WIDTHS.get(width)
    if count is None:
        raise WeightsError(
            f"the number of attention heads of {source} is not in its shapes (width {width}): say "
            "it with --heads, or put the original config.json beside the weights"
        )
    if not isinstance(count, int) or count < 1 or width % count or (width // count) % 2:
        raise WeightsError(
            f"{count!r} attention heads do not divide the width {width} of {source} into even "
            "parts: say the right number with --heads"
        )
    return {"num_attention_heads": count, "attention_head_dim": width // count}


def _write(
    folder: Path, shards: list[list[Spec]], config: dict[str, Any], make: Callable[[str], Tensor]
) -> None:
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        suffix = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        file = folder / f"{STEMS[0]}{suffix}.safetensors"
        write_safetensors(file, shard, {"format": "pt"}, make)
        weight_map |= {name: file.name for name, _, _ in shard}
    if len(shards) > 1:
        size = sum(dtype.itemsize * math.prod(shape) for s in shards for _, dtype, shape in s)
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        _write_json(folder / f"{STEMS[0]}{INDEX_SUFFIX}", index)
    _write_json(folder / "config.json", config)


def _write_json(file: Path, values: dict[str, Any]) -> None:
    with file.open("x", encoding="utf-8") as stream:
        stream.write(json.dumps(values, indent=2) + "\n")
        stream.flush()
        os.fsync(stream.fileno())
