"""Read what an analysis proposes, and write it as a recipe."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from quant.errors import StudyError
from quant.recipe.recipe import QuantRecipe
from quant.studies.output.study_folder import StudyFolder, read_results
from quant.studies.points import PointsFolder
from quant.weights.writer import write_whole


@dataclass(frozen=True, slots=True)
class Proposal:
    """What a finished analysis proposes.

    Attributes:
        folder: of the analysis, with the units that it measured.
        blocks: those to protect.
        prompts: those that the analysis has seen.
    """

    folder: StudyFolder
    blocks: tuple[int, ...]
    prompts: tuple[str, ...]


def read_proposal(path: Path, fingerprint: str, held_out: PointsFolder) -> Proposal:
    """Read an analysis of the model `fingerprint`, to be tested on other prompts than its own.

    Raises:
        StudyError: it is not finished, of another model, or has prompts in common with `held_out`.
    """
    folder = StudyFolder.finished(path, "analyze")
    if folder.identity["model"] != fingerprint:
        raise StudyError(f"{path} is of another model: analyze this one first")
    prompts = json.loads(folder.identity["set of points"])["prompts"]
    held_out.check_apart(frozenset(prompts), f"the analysis {path}")
    return Proposal(folder, tuple(read_results(path, "analyze")["proposed"]), tuple(prompts))


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
