"""Write a recipe that protects the blocks an analysis proposes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from quant.errors import StudyError
from quant.recipe.recipe import QuantRecipe
from quant.weights.writer import write_whole


def write_recipe(path: Path, base: QuantRecipe, blocks: int, protected: Sequence[int]) -> None:
    """Write `base` with other protected blocks as TOML.

    Args:
        blocks: how many blocks the model has.

    Raises:
        StudyError: the file cannot be written.
    """
    values = base.to_dict() | {
        "name": f"{base.name}-auto",
        "description": f"{base.name} with the blocks protected that an analysis proposes",
        "total_blocks": blocks,
        "protected_blocks": list(protected),
    }
    tables = {key: value for key, value in values.items() if isinstance(value, dict)}
    lines = [f"{key} = {json.dumps(values[key])}" for key in values if key not in tables]
    for key, table in tables.items():
        lines += ["", f"[{key}]", *(f"{name} = {json.dumps(each)}" for name, each in table.items())]
    try:
        write_whole(path, ("\n".join(lines) + "\n").encode())
    except OSError as error:
        raise StudyError(f"cannot write {path}: {error.strerror or error}") from error
    QuantRecipe.load(path)
