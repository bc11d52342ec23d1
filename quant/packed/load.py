"""Open a packed checkpoint, check that it fits, and load its transformer.

The weights of quantized linears never exist in BF16 while loading, neither on the host nor on the
device. Nothing is allocated before names, shapes and dtypes of all tensors have been checked.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn

from quant.calibration.scales import Scales, load_scales
from quant.errors import PackedMismatch, RecipeError, ScalesError, WeightsError
from quant.packed.convert import file_sha256
from quant.packed.format import (
    FORMAT,
    FORMAT_VERSION,
    SCALES_FILE,
    SHARD_PATTERN,
    PackedInfo,
    shard_name,
)
from quant.recipe.recipe import QuantRecipe
from quant.recipe.selection import scales_serve
from quant.transformer.meta_model import (
    check_stored,
    empty_transformer,
    load_weights,
    move_buffers,
    quantized_meta_model,
    shared_quantized_meta_model,
    unloaded_state,
)
from quant.transformer.module_tree import share_tree
from quant.weights.fingerprint import other_model
from quant.weights.header import Header, StoredTensor, read_header, tensors_by_name
from quant.weights.reader import Reader

if TYPE_CHECKING:
    from diffusers import WanTransformer3DModel

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True, slots=True)
class PackedCheckpoint:
    """A packed checkpoint whose headers have been read.

    Attributes:
        scales: the scales file it was made with, with its calibration statistics.
        stored: the location of each of its tensors, by name.
    """

    folder: Path
    info: PackedInfo
    scales: Scales
    stored: dict[str, StoredTensor]

    @property
    def linears(self) -> int:
        """Return the number of quantized linears."""
        return sum(name.endswith(".weight_qdata") for name in self.stored)


def open_packed(
    folder: Path,
    *,
    model_folder: Path | None = None,
    recipe: QuantRecipe | None = None,
    loras: Sequence[str] = (),
) -> PackedCheckpoint:
    """Read the headers of a packed checkpoint and check that it is complete.

    Args:
        model_folder: the model it is to be used for.
        recipe: the recipe it is to be used for.
        loras: those to be merged into the model, as values of `--lora`. These three appear only in
            the command that an error message recommends.

    Raises:
        WeightsError: the folder is not a packed checkpoint, lacks a file, or a file is truncated
            (the message then names a tensor).
        PackedMismatch: it has another format version.
    """
    command = convert_command(folder, model_folder, recipe, loras)
    if not folder.exists():
        raise WeightsError(f"{folder} does not exist; make it with: {command}")
    files = sorted(folder.glob(SHARD_PATTERN))
    if not files:
        raise WeightsError(
            f"{folder} is not a packed checkpoint: it holds no {SHARD_PATTERN}; make one with: "
            f"{command}"
        )
    headers = {file: read_header(file) for file in files}
    info = _read_info(headers, command)
    scales_file = folder / SCALES_FILE
    try:
        scales = load_scales(scales_file)
    except ScalesError as error:
        # That error, also a mismatch, recommends to make new scales. These would not help, because
        # the checkpoint's scales belong to its other files.
        reason = str(error).partition(";")[0]
        raise WeightsError(f"{reason}; make the checkpoint again with: {command}") from error
    if file_sha256(scales_file) != info.scales_sha256:
        raise WeightsError(
            f"{scales_file} is not the scales file the checkpoint was made with; make it again "
            f"with: {command}"
        )
    return PackedCheckpoint(folder, info, scales, tensors_by_name(headers.values()))


def check_packed(
    packed: PackedCheckpoint,
    *,
    model_fingerprint: str,
    recipe: QuantRecipe,
    model_folder: Path | None = None,
    loras: Sequence[str] = (),
) -> QuantRecipe:
    """Check that a packed checkpoint was made for a model and a recipe, and that its tensors fit.

    Args:
        model_fingerprint: of the model with its LoRAs, if it has some.
        model_folder, loras: as for `open_packed`.

    Returns:
        The recipe; one with `protect = "auto"` gets the blocks that the checkpoint was made with.

    Raises:
        PackedMismatch: it is for another model or recipe; the message ends with the command to run.
        WeightsError: naming the tensor that is missing, has another shape or dtype, or is a scale
            that differs from the scales file.
        ConversionError: its recipe does not fit its transformer.
    """
    info, name = packed.info, packed.folder
    (found, reason), problem = _resolved(recipe, packed.scales), None
    if info.model_fingerprint != model_fingerprint:
        differing = other_model(info.model_fingerprint, model_fingerprint)
        problem = f"the packed checkpoint {name} was made of {differing}"
    elif reason:
        problem = f"the packed checkpoint {name} does not fit: {reason}"
    elif not scales_serve(info.recipe, found):
        problem = (
            f"the packed checkpoint {name} is of recipe {info.recipe.name!r} "
            f"({info.recipe.fingerprint}), this is {found.name!r} ({found.fingerprint})"
        )
    command = convert_command(name, model_folder, recipe, loras)
    if problem:
        raise PackedMismatch(f"{problem}; make a fitting one with: {command}")
    meta_model = shared_quantized_meta_model(info.transformer_config, info.recipe)
    check_stored(meta_model.state_dict(), packed.stored, source=str(name), exact=True)
    _check_own_scales(packed, command)
    return found


def _resolved(recipe: QuantRecipe, scales: Scales) -> tuple[QuantRecipe, str]:
    """Return a recipe with the blocks of the scales' analysis, and why these do not fit, or ""."""
    if scales.protection is None:
        reason = f"recipe {recipe.name!r} has protect = 'auto', and it holds no analysis"
        return recipe, reason if recipe.is_auto else ""
    try:
        return scales.protection.resolve(recipe), ""
    except RecipeError as error:
        return recipe, str(error)


def _check_own_scales(packed: PackedCheckpoint, command: str) -> None:
    """Compare the scales among its tensors with the scales file, which is known to be complete."""
    with ExitStack() as opened:
        files = {
            file: opened.enter_context(file.open("rb"))
            for file in {stored.file for stored in packed.stored.values()}
        }
        for kind in ("weight_scale", "act_scale"):
            for linear, scale in getattr(packed.scales, kind).items():
                stored = packed.stored.get(f"{linear}.{kind}")
                if stored is None:
                    continue
                found = os.pread(files[stored.file].fileno(), stored.nbytes, stored.start)
                if found != scale.numpy().tobytes():
                    values = torch.frombuffer(bytearray(found), dtype=stored.dtype).tolist()
                    pairs = zip(values, scale.flatten().tolist(), strict=True)
                    ours, theirs = next(pair for pair in pairs if pair[0] != pair[1])
                    raise WeightsError(
                        f"tensor {stored.name!r} in {stored.file} has {ours:g}, where "
                        f"{SCALES_FILE} has {theirs:g}: the checkpoint is damaged; make it again "
                        f"with: {command}"
                    )


def load_packed(packed: PackedCheckpoint, reader: Reader) -> WanTransformer3DModel:
    """Load the quantized transformer alone onto the reader's device. Call `check_packed` first.

    Raises:
        WeightsError: a file cannot be read or has become shorter.
    """
    meta_model = shared_quantized_meta_model(packed.info.transformer_config, packed.info.recipe)
    transformer = share_tree(meta_model, lambda _name, _module: None)
    return move_buffers(load_weights(transformer, packed.stored, reader), reader.device)


def load_packed_base(
    packed: Sequence[PackedCheckpoint],
    reader: Reader,
    *,
    base: WanTransformer3DModel | None = None,
    leave: Collection[str] = (),
) -> WanTransformer3DModel:
    """Load the tensors that several packed checkpoints of one model share.

    All other tensors of the returned BF16 tree stay on the meta device. Load each checkpoint's
    transformer with `load_packed_shared` afterwards.

    Args:
        base: a BF16 tree to go on with: only what it lacks is loaded, into it.
        leave: tensors to leave as they are, because these checkpoints have other LoRAs in them
            than those that the tree is shared with.

    Raises:
        WeightsError: a file cannot be read or has become shorter.
    """
    if base is None:
        base = empty_transformer(packed[0].info.transformer_config)
    for each in packed:
        quantized = quantized_meta_model(base, each.info.recipe)
        shared = unloaded_state(quantized).keys() & unloaded_state(base).keys()
        load_weights(base, each.stored, reader, shared - set(leave))
    return move_buffers(base, reader.device)


def load_packed_shared(packed: PackedCheckpoint, transformer: M, reader: Reader) -> M:
    """Load the quantized linears only, into a shared copy of a transformer that is loaded.

    The copy shares all other tensors with `transformer`, as with `quantize_transformer`. Call
    `check_packed` first.

    Raises:
        ConversionError: the tree carries hooks, or its configuration is not this checkpoint's.
        WeightsError: a file cannot be read or has become shorter.
    """
    shared_copy = quantized_meta_model(transformer, packed.info.recipe)
    own = unloaded_state(shared_copy)
    stored = {name: each for name, each in packed.stored.items() if name in own}
    check_stored(own, stored, source=str(packed.folder), exact=True)
    return load_weights(shared_copy, packed.stored, reader)


def convert_command(
    folder: Path,
    model_folder: Path | None,
    recipe: QuantRecipe | None,
    loras: Sequence[str] = (),
) -> str:
    """Return the command that makes a packed checkpoint; unknown arguments are in upper case."""
    arguments = ["--model", str(model_folder or "MODEL_FOLDER"), "--scales", "SCALES_FILE"]
    arguments += [word for lora in loras for word in ("--lora", lora)]
    if recipe:
        arguments += ["--recipe", recipe.source or recipe.name]
    arguments += ["--out", str(folder)]
    return shlex.join([sys.executable or "python", "-m", "quant", "convert", *arguments])


def _read_info(headers: dict[Path, Header], command: str) -> PackedInfo:
    """Read the metadata of all files and check that they belong to one checkpoint."""
    infos = []
    for file, header in headers.items():
        metadata = header.metadata
        if metadata.get("format") != FORMAT:
            raise WeightsError(
                f"{file} is not part of a packed checkpoint; make one with: {command}"
            )
        if metadata.get("format_version") != FORMAT_VERSION:
            raise PackedMismatch(
                f"{file} has packed format {metadata.get('format_version')}, this tool reads "
                f"{FORMAT_VERSION}; make a fitting one with: {command}"
            )
        try:
            infos.append(PackedInfo.from_metadata(metadata))
            count = int(metadata["shard"].rpartition(" of ")[2])
        except (LookupError, ValueError, TypeError, RecipeError) as error:
            raise WeightsError(
                f"{file} does not say what it was made of: {error!r}; make it again with: {command}"
            ) from error
        missing = {shard_name(n + 1, count) for n in range(count)} - {each.name for each in headers}
        if missing:
            raise WeightsError(
                f"{file.parent} lacks {', '.join(sorted(missing))}: copy it again, or make it "
                f"with: {command}"
            )
    if any(info != infos[0] for info in infos):
        raise WeightsError(
            f"the files in {file.parent} come from different conversions; make them again "
            f"with: {command}"
        )
    return infos[0]
