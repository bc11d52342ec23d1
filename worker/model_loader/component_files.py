"""Check and read the files of a model's components, and name the file that is broken."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from quant import WeightsError
from quant.weights.header import read_header
from quant.weights.weight_files import visible, weight_files
from worker.errors import ModelUnusable

CONFIG = "*config.json"
WEIGHTS = "*.safetensors"
TOKENIZER = "tokenizer.json"


def load_component(
    load: Callable[..., Any], folder: Path, needed: str = WEIGHTS, **options: Any
) -> Any:
    """Call a library's `from_pretrained` on a local folder; nothing is downloaded or unpickled.

    Args:
        load: the `from_pretrained`.
        needed: a pattern of files that must exist besides a configuration.
        options: passed to `load`.

    Raises:
        ModelUnusable: a file is missing, or cannot be read.
    """
    if needed == WEIGHTS:
        options["use_safetensors"] = True
    check_files(folder, needed)
    try:
        return load(folder, local_files_only=True, **options)
    except (OSError, ValueError, RuntimeError, TypeError, LookupError) as error:
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ModelUnusable(f"The model component {folder} cannot be loaded: {reason}") from error


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object; raises OSError or ValueError."""
    values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return values


def check_files(folder: Path, needed: str) -> None:
    """Refuse missing and broken files by name; the libraries would report a failed download.

    The content of tokenizer.json is not checked here: parsing a large one twice would take long.

    Raises:
        ModelUnusable: names the file.
    """
    files = visible(folder.glob("*"))
    read = weight_files(folder)  # others may lie beside them
    for pattern in (CONFIG, needed):
        if not any(file.match(pattern) for file in files):
            raise ModelUnusable(f"The model component {folder} lacks a file {pattern}.")
    for file in files:
        try:
            if file.suffix == ".json" and file.name != TOKENIZER:
                if not isinstance(json.loads(file.read_text(encoding="utf-8")), dict):
                    raise ValueError("it holds no JSON object")
            elif file in read:
                read_header(file)
        except WeightsError as error:
            raise ModelUnusable(f"The model cannot be read: {error}") from error
        except (OSError, ValueError) as error:
            raise ModelUnusable(f"The model file {file} cannot be read: {error}") from error
