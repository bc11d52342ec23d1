"""Read, write and check the scales file, the result of a calibration.

It is one safetensors file with three kinds of content: the scales that a quantized model is built
with (`<linear>.weight_scale`, `<linear>.act_scale`, and for FP8 attention
`blocks.2.attn1.q.attention_scale` and so on), the statistics they were chosen from, and metadata
that identifies the model, recipe, prompts and sampler they belong to. A file's name is never
trusted: a worker calls `check_scales` before it builds anything.
"""

from __future__ import annotations

import json
import math
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load
from torch import Tensor

from quant.calibration.sampler import SamplerSettings
from quant.device import available_accelerator
from quant.errors import CalibrationError, RecipeError, ScalesError, ScalesMismatch
from quant.recipe.evidence import ProtectionEvidence
from quant.recipe.recipe import QuantRecipe, shipped_recipes
from quant.recipe.selection import scales_serve
from quant.weights.fingerprint import other_model
from quant.weights.writer import to_bytes, write_whole

FORMAT_VERSION = "1"


@dataclass(frozen=True, slots=True)
class Scales:
    """A loaded scales file of P prompts, G timestep groups (noisiest first) and M linears.

    P and G are 0 if the scales come from the weights alone (`quant.transformer.weight_scales`).
    FP8 attention adds A tensors, `recipe.attention_inputs`; without it, A is 0.

    Attributes:
        model_fingerprint: of the model that was calibrated (`quant.weights.fingerprint`).
        prompts_file: the name of the prompt file, for people; `prompts_sha256` identifies it.
        sampler: None if there were no prompts.
        linears: full names, in the order of the statistics' first dimension.
        weight_scale: per linear, [] or [N, 1] float32.
        act_scale: per linear, [] float32; empty if the recipe has scales per token.
        weight_amax: [M] float32.
        act_amax: [M, G, P] float32, largest magnitude of a linear's input.
        act_mean_square: [M, G, P] float32, mean square of that input.
        act_binades: [M, G, NUM_BINADES] float32, counts per binade (`quant.numerics.scaling`) over
            all prompts.
        attention_scale: per query, key and value, [] float32; empty for BF16 attention.
        attention_amax: [A, G, P] float32; of queries and keys, of the lengths of rotary pairs.
        attention_mean_square: [A, G, P] float32.
        attention_binades: [A, G, NUM_BINADES] float32.
        protection: why the recipe's blocks are protected, if an analysis has chosen them.
    """

    model_fingerprint: str
    recipe: QuantRecipe
    prompts_sha256: str
    prompts_file: str
    sampler: SamplerSettings | None
    tool_version: str
    linears: tuple[str, ...]
    weight_scale: dict[str, Tensor]
    act_scale: dict[str, Tensor]
    weight_amax: Tensor
    act_amax: Tensor
    act_mean_square: Tensor
    act_binades: Tensor
    attention_scale: dict[str, Tensor]
    attention_amax: Tensor
    attention_mean_square: Tensor
    attention_binades: Tensor
    protection: ProtectionEvidence | None = None

    @property
    def num_prompts(self) -> int:
        """Return the number of prompts that the statistics come from."""
        return self.act_amax.shape[2]


_STATISTICS = ("weight_amax", "act_amax", "act_mean_square", "act_binades")
_ATTENTION_STATISTICS = ("attention_amax", "attention_mean_square", "attention_binades")


def save_scales(scales: Scales, path: Path) -> None:
    """Write a scales file atomically.

    Raises:
        ScalesError: the folder does not exist or cannot be written.
    """
    statistics = _STATISTICS + _ATTENTION_STATISTICS if scales.attention_scale else _STATISTICS
    tensors = {name: getattr(scales, name) for name in statistics}
    tensors |= {f"{name}.attention_scale": x for name, x in scales.attention_scale.items()}
    tensors |= {f"{name}.weight_scale": scale for name, scale in scales.weight_scale.items()}
    tensors |= {f"{name}.act_scale": scale for name, scale in scales.act_scale.items()}
    metadata = {
        "format_version": FORMAT_VERSION,
        "model_fingerprint": scales.model_fingerprint,
        "recipe": scales.recipe.to_json(),
        "prompts_sha256": scales.prompts_sha256,
        "prompts_file": scales.prompts_file,
        "sampler": json.dumps(scales.sampler and scales.sampler.to_dict()),
        "tool_version": scales.tool_version,
        "linears": json.dumps(scales.linears),
    }
    if scales.protection is not None:
        metadata["protection"] = scales.protection.to_json()
    try:
        write_whole(path, to_bytes(tensors, metadata))
    except OSError as error:
        raise ScalesError(f"cannot write {path}: {error.strerror or error}") from error


def load_scales(
    path: Path,
    *,
    model_folder: Path | None = None,
    recipe: QuantRecipe | None = None,
    loras: Sequence[str] = (),
    sampling: Sequence[str] = (),
) -> Scales:
    """Read a scales file.

    Args:
        model_folder: the model they are to be used for. It appears only in the command that an
            error message recommends.
        recipe: the recipe they are to be used for, named in that command as well. `check_scales`
            checks that they were made for it.
        loras: those to be merged into the model, as values of `--lora`, for that command.
        sampling: how the scales will be served, as further arguments of that command.

    Raises:
        ScalesError: there is no such file, or it is not a scales file.
        ScalesMismatch: it has another format version, or lacks the scales that `recipe` needs for
            FP8 attention.
    """
    if not path.is_file():
        command = calibrate_command(
            path, model_folder, recipe=recipe, loras=loras, sampling=sampling
        )
        raise ScalesError(f"there is no scales file {path}; make one with: {command}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format_version", FORMAT_VERSION) != FORMAT_VERSION:
                prompts = metadata.get("prompts_file")
                command = calibrate_command(
                    free_path(path), model_folder, prompts=prompts, recipe=recipe, loras=loras
                )
                raise ScalesMismatch(
                    f"{path} has scales format {metadata['format_version']}, this tool reads "
                    f"{FORMAT_VERSION}; make fitting ones with: {command}"
                )
        # Not through the open file, which takes three times as long for hundreds of scalars.
        scales = _parse(metadata, load(path.read_bytes()))
    except (
        SafetensorError,
        KeyError,
        ValueError,
        TypeError,
        RecipeError,
        CalibrationError,
    ) as error:
        raise ScalesError(f"{path} is not a scales file: {error!r}") from error
    if recipe is not None and recipe.attention == "fp8" != scales.recipe.attention:
        command = calibrate_command(
            free_path(path),
            model_folder,
            prompts=scales.prompts_file,
            recipe=recipe,
            loras=loras,
        )
        raise ScalesMismatch(
            f"{path} has no scales for the FP8 attention of recipe {recipe.name!r}; "
            f"make them with: {' '.join([command, *_arguments(scales)])}"
        )
    return scales


def check_scales(  # noqa: PLR0913 (the last four only name the remedy)
    scales: Scales,
    *,
    model_fingerprint: str,
    recipe: QuantRecipe,
    path: Path | None = None,
    model_folder: Path | None = None,
    loras: Sequence[str] = (),
    sampling: Sequence[str] = (),
) -> QuantRecipe:
    """Check that scales were made for a model and a recipe.

    Args:
        model_fingerprint: of the model with its LoRAs, if it has some.
        path: the scales file.
        model_folder: the model's folder.
        loras: those that are merged into it, as values of `--lora`.
        sampling: how the scales will be served, as arguments of `calibrate`. These four appear in
            the command that an error recommends.

    Returns:
        The recipe; one with `protect = "auto"` gets the blocks that the scales were made with.

    Raises:
        ScalesMismatch: they are for another model or recipe; the message ends with the command to
            run.
    """
    if scales.model_fingerprint != model_fingerprint:
        differing = other_model(scales.model_fingerprint, model_fingerprint)
        problem = f"the scales were calibrated on {differing}"
        # Another model's sampler settings do not apply to this one.
        arguments, remedy = list(sampling), "make"
    else:
        found, problem = _resolve(recipe, scales)
        if not problem:
            return found
        name = scales.recipe.name if scales.recipe.name in shipped_recipes() else "RECIPE_FILE"
        remedy = f"ask for their recipe (add --recipe {name}, or name it in the mode), or make"
        arguments = _arguments(scales)
    command = calibrate_command(
        None if path is None else free_path(path),
        model_folder,
        prompts=scales.prompts_file,
        recipe=recipe,
        loras=loras,
    )
    raise ScalesMismatch(
        f"{problem}; {remedy} fitting ones with: {' '.join([command, *arguments])}"
    )


def _resolve(recipe: QuantRecipe, scales: Scales) -> tuple[QuantRecipe, str]:
    """Return a recipe with its blocks, and what it differs from the scales in, or ""."""
    if recipe.is_auto and scales.protection is None:
        return recipe, (
            f"recipe {recipe.name!r} has protect = 'auto', and the scales, for recipe "
            f"{scales.recipe.name!r}, hold no analysis that has chosen their blocks"
        )
    if scales.protection is not None:
        try:
            recipe = scales.protection.resolve(recipe)
        except RecipeError as error:
            return recipe, f"the scales do not fit: {error}"
    if scales_serve(scales.recipe, recipe):
        return recipe, ""
    return recipe, (
        f"the scales are for recipe {scales.recipe.name!r} ({scales.recipe.fingerprint}), "
        f"this is {recipe.name!r} ({recipe.fingerprint})"
    )


def check_replaceable(path: Path, model_fingerprint: str, recipe: QuantRecipe) -> None:
    """Refuse to overwrite anything but scales of the same model and recipe.

    Raises:
        ScalesError: the file holds something else.
    """
    if not path.exists():
        return
    remedy = "choose another --out, or delete the file first"
    try:
        found = load_scales(path)
    except ScalesError as error:
        raise ScalesError(
            f"{path} is there already and holds no scales that this tool reads: {remedy}"
        ) from error
    if found.model_fingerprint != model_fingerprint:
        raise ScalesError(
            f"{path} holds the scales of another model, {found.model_fingerprint}: {remedy}"
        )
    if found.recipe.fingerprint != recipe.fingerprint:
        raise ScalesError(
            f"{path} holds the scales of another recipe, {found.recipe.name!r} "
            f"({found.recipe.fingerprint}): {remedy}"
        )


def free_path(path: Path) -> Path:
    """Return `path`, or with a number in its name where that exists, which is to be kept."""
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_stem(f"{path.stem}-{number}")
    return free


def calibrate_command(
    path: Path | None,
    model_folder: Path | None,
    *,
    prompts: str | None = None,
    recipe: QuantRecipe | None = None,
    loras: Sequence[str] = (),
    sampling: Sequence[str] = (),
) -> str:
    """Return the command that makes a scales file; unknown arguments are in upper case.

    It uses this process's interpreter, which has the toolkit, and an accelerator if there is one.
    """
    arguments = ["--model", str(model_folder or "MODEL_FOLDER")]
    arguments += [word for lora in loras for word in ("--lora", lora)]
    if recipe is None or recipe.needs_prompts:
        arguments += ["--prompts", _prompts_argument(prompts, model_folder)]
    arguments += ["--out", str(path or "SCALES_FILE")]
    if recipe:
        known = recipe.name if recipe.name in shipped_recipes() else "RECIPE_FILE"
        arguments += ["--recipe", recipe.source or known]
        arguments += ["--analysis", "ANALYSIS_FOLDER"] if recipe.is_auto else []
    arguments += sampling
    if (device := available_accelerator()) is not None:
        arguments += ["--device", device]
    return shlex.join([sys.executable or "python", "-m", "quant", "calibrate", *arguments])


def _prompts_argument(prompts: str | None, model_folder: Path | None) -> str:
    """Find the file of prompts, of which scales know the name only: from here, or in the model."""
    if prompts:
        for folder in filter(None, (Path(), model_folder)):
            if (folder / prompts).is_file():
                return str(folder / prompts)
    return "PROMPTS_FILE"


def _arguments(scales: Scales) -> list[str]:
    """Return the arguments that repeat how scales were made."""
    return [] if scales.sampler is None else scales.sampler.arguments()


def _parse(metadata: dict[str, str], tensors: dict[str, Tensor]) -> Scales:
    if "format_version" not in metadata:
        raise ValueError("its metadata has no format_version")
    recipe = QuantRecipe.from_json(metadata["recipe"])
    statistics = {name: tensors.pop(name) for name in _STATISTICS}
    if recipe.attention_inputs:
        statistics |= {name: tensors.pop(name) for name in _ATTENTION_STATISTICS}
    else:  # files older than FP8 attention do not have them
        for name, like in zip(_ATTENTION_STATISTICS, _STATISTICS[1:], strict=True):
            statistics[name] = statistics[like][:0].clone()
    kinds = ("weight_scale", "act_scale", "attention_scale")
    by_kind: dict[str, dict[str, Tensor]] = {kind: {} for kind in kinds}
    for name, tensor in tensors.items():
        linear, _, kind = name.rpartition(".")
        by_kind[kind][linear] = tensor
    _check_scale_values(by_kind)
    missing = set(recipe.attention_inputs) - set(by_kind["attention_scale"])
    if missing:
        raise ValueError(f"it has no attention_scale for {min(missing)}")
    sampler: dict[str, Any] | None = json.loads(metadata["sampler"])
    protection = None  # files older than `protect` do not have it
    if "protection" in metadata:
        protection = ProtectionEvidence.from_json(metadata["protection"])
        if protection.blocks != recipe.protected_blocks:
            raise ValueError(
                f"its recipe protects blocks {list(recipe.protected_blocks)}, the analysis in it "
                f"has chosen {list(protection.blocks)}"
            )
        if protection.model_fingerprint != metadata["model_fingerprint"]:
            raise ValueError(
                f"it is of model {metadata['model_fingerprint']}, the analysis in it of "
                f"{protection.model_fingerprint}"
            )
    return Scales(
        model_fingerprint=metadata["model_fingerprint"],
        recipe=recipe,
        prompts_sha256=metadata["prompts_sha256"],
        prompts_file=metadata["prompts_file"],
        sampler=None if sampler is None else SamplerSettings.from_dict(sampler),
        tool_version=metadata["tool_version"],
        linears=tuple(json.loads(metadata["linears"])),
        weight_scale=by_kind["weight_scale"],
        act_scale=by_kind["act_scale"],
        attention_scale=by_kind["attention_scale"],
        protection=protection,
        **statistics,
    )


def _check_scale_values(by_kind: dict[str, dict[str, Tensor]]) -> None:
    all_scales = [
        tensor.reshape(-1).float() for scales in by_kind.values() for tensor in scales.values()
    ]
    if not all_scales or _valid(torch.cat(all_scales)):
        return
    for kind, scales in by_kind.items():
        for name, scale in scales.items():
            if not _valid(scale):
                wrong = next(x for x in scale.flatten().tolist() if not 0 < x < math.inf)
                raise ValueError(f"{name}.{kind} has {wrong}, and scales are positive and finite")


def _valid(scale: Tensor) -> bool:
    return bool(((scale > 0) & scale.isfinite()).all())
