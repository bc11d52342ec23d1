"""Read what an analysis proposes, and write it as a recipe."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from quant.calibration.scales import load_scales
from quant.errors import StudyError
from quant.recipe.evidence import BlockEnergy, ProtectionEvidence, measured_recipe
from quant.recipe.recipe import QuantRecipe
from quant.studies.output.study_folder import StudyFolder, read_results, read_state
from quant.studies.points import PointsFolder
from quant.weights.writer import write_whole


@dataclass(frozen=True, slots=True)
class Proposal:
    """What a finished analysis proposes.

    Attributes:
        folder: of the analysis, with the units that it measured.
        blocks: those to protect.
        prompts: those that the analysis has seen.
        recipe: fingerprint of what it measured (`measured_recipe`); "" in one of before.
        sha256: of its results.json.
    """

    folder: StudyFolder
    blocks: tuple[int, ...]
    prompts: tuple[str, ...]
    recipe: str
    sha256: str

    def check_recipe(self, recipe: QuantRecipe, total_blocks: int) -> None:
        """Refuse a recipe of another format, other scales or other linears than were measured.

        Raises:
            StudyError: it is another, or the analysis does not say what it measured.
        """
        if not self.recipe:
            raise StudyError(_older(self.folder.path))
        if self.recipe != measured_recipe(recipe, total_blocks).fingerprint:
            raise StudyError(
                f"{self.folder.path} measured another format, other scales or other linears than "
                f"those of recipe {recipe.name!r}: analyze that first"
            )


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
    results = read_results(path, "analyze")
    return Proposal(
        folder,
        tuple(results["proposed"]),
        tuple(prompts),
        results.get("measured_recipe", ""),
        _digest(path),
    )


def read_evidence(path: Path, fingerprint: str) -> ProtectionEvidence:
    """Read what a finished analysis of the model `fingerprint` has measured of its blocks.

    Raises:
        StudyError: it is not finished, of another model, or damaged.
    """
    results, state = read_results(path, "analyze"), read_state(path)
    identity = state["identity"]
    if identity["model"] != fingerprint:
        raise StudyError(f"{path} is of another model: analyze this one first")
    if "measured_recipe" not in results:
        raise StudyError(_older(path))
    points = json.loads(identity["set of points"])
    try:
        energy = [results["blocks"][str(block)] for block in range(len(results["blocks"]))]
        return ProtectionEvidence(
            model_fingerprint=fingerprint,
            recipe=results["measured_recipe"],
            blocks=tuple(results["proposed"]),
            energy=tuple(
                BlockEnergy(*(each[n] for n in ("mean", "low", "high"))) for each in energy
            ),
            budget=results["budget"],
            prompts=results["prompts"],
            points=energy[0]["values"],
            prompts_file=points["prompts_file"],
            prompts_sha256=points["prompts_sha256"],
            points_sha256=hashlib.sha256(identity["set of points"].encode()).hexdigest(),
            analysis_sha256=_digest(path),
            options=json.loads(identity["set of options"]) | {"device": identity["device"]},
            tool_version=state["tool_version"],
        )
    except (OSError, LookupError, TypeError, ValueError) as error:
        raise StudyError(f"{path} is damaged: analyze again into another folder") from error


def _digest(path: Path) -> str:
    return hashlib.sha256((path / "results.json").read_bytes()).hexdigest()


def _older(path: Path) -> str:
    return (
        f"{path} was written by an older version, which did not say which format, scales and "
        "linears it measured: analyze again into another folder"
    )


def resolve_recipe(
    recipe: QuantRecipe, analysis: Path | None, scales_file: Path, fingerprint: str
) -> tuple[QuantRecipe, ProtectionEvidence | None]:
    """Return a recipe with its blocks, and the evidence if an analysis chooses them.

    Args:
        analysis: folder of `analyze`, if one was given.
        scales_file: what is to be written; scales that are there hold evidence, perhaps.
        fingerprint: of the model.

    Raises:
        StudyError: the analysis does not fit, or is given for a recipe that lists its blocks.
        RecipeError: the analysis is of another recipe; or the recipe has `protect = "auto"`, and
            there is neither an analysis nor evidence.
    """
    if not recipe.is_auto:
        if analysis is not None:
            raise StudyError(
                f"recipe {recipe.name!r} lists its protected blocks, so --analysis would change "
                "nothing: leave it out, or take a recipe with protect = 'auto'"
            )
        return recipe, None
    if analysis is not None:
        evidence = read_evidence(analysis, fingerprint)
        return evidence.resolve(recipe), evidence
    if scales_file.exists():
        stored = load_scales(scales_file)
        if stored.protection is not None and stored.model_fingerprint == fingerprint:
            return stored.protection.resolve(recipe), stored.protection
    recipe.check_resolved()
    raise AssertionError("a recipe that is still open is refused")


def write_recipe(path: Path, base: QuantRecipe, blocks: int, protected: Sequence[int]) -> None:
    """Write `base` with other protected blocks as TOML.

    Args:
        blocks: how many blocks the model has.

    Raises:
        StudyError: the file cannot be written.
    """
    chosen = replace(
        base,
        name=base.name if base.is_auto else f"{base.name}-auto",
        description=f"{base.name} with the blocks protected that an analysis proposes",
        protect="",
        total_blocks=blocks,
        protected_blocks=tuple(protected),
    )
    values = chosen.to_dict()
    tables = {key: value for key, value in values.items() if isinstance(value, dict)}
    lines = [f"{key} = {json.dumps(values[key])}" for key in values if key not in tables]
    for key, table in tables.items():
        lines += ["", f"[{key}]", *(f"{name} = {json.dumps(each)}" for name, each in table.items())]
    try:
        write_whole(path, ("\n".join(lines) + "\n").encode())
    except OSError as error:
        raise StudyError(f"cannot write {path}: {error.strerror or error}") from error
    QuantRecipe.load(path)
