"""Copy model folders and change their weights or configurations, for tests of what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor


def copy_model(model: Path, to: Path) -> Path:
    """Copy a model's folder."""
    return Path(shutil.copytree(model, to))


def rename_weights(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Replace the tensors of a component's only file by what `change` makes of them."""
    file = next(folder.glob("*.safetensors"))
    tensors = change(load_file(file))
    save_file(tensors, file, {"format": "pt"})


def update_json(file: Path, **values: Any) -> None:
    """Set keys of a JSON file."""
    read = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(read | values), encoding="utf-8")


def original_name(name: str) -> str:
    """Return the name that Wan's original repository gives a tensor of diffusers' transformer.

    It is written as the inverse of diffusers' own substitutions, not of ours.
    """
    for ours, theirs in _INVERSE:
        name = name.replace(ours, theirs)
    if name == "scale_shift_table":
        return "head.modulation"
    return name.replace("scale_shift_table", "modulation")


_INVERSE = (
    ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    ("condition_embedder.time_proj", "time_projection.1"),
    ("attn1.", "self_attn."),
    ("attn2.", "cross_attn."),
    (".to_out.0.", ".o."),
    (".to_q.", ".q."),
    (".to_k.", ".k."),
    (".to_v.", ".v."),
    ("proj_out.", "head.head."),
    ("ffn.net.0.proj", "ffn.0"),
    ("ffn.net.2", "ffn.2"),
    (".norm2.", ".norm3."),
)
