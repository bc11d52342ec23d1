"""Open a packed checkpoint, refuse it where it does not fit, and make its transformer.

Nothing of the quantized linears ever exists in BF16 on the way, on the host or on the device, and
nothing is allocated before names, shapes and dtypes of all tensors are found right.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
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
from quant.transformer.meta_model import (
    check_stored,
    empty_transformer,
    load_weights,
    move_buffers,
    quantized_skeleton,
    shared_quantized_skeleton,
    stored_state,
)
from quant.transformer.module_tree import share_tree
from quant.weights.header import Header, StoredTensor, read_header, tensors_by_name
from quant.weights.reader import Reader

if TYPE_CHECKING:
    from diffusers import WanTransformer3DModel

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True, slots=True)
class PackedCheckpoint:
    """A packed checkpoint whose headers have been read.

    Attributes:
        scales: the scales it was made with, and what else calibration found.
        stored: its tensors, by name.
    """

    folder: Path
    info: PackedInfo
    scales: Scales
    stored: dict[str, StoredTensor]

    @property
    def linears(self) -> int:
        """How many linears it holds packed."""
        return sum(name.endswith(".weight_qdata") for name in self.stored)


def open_packed(
    folder: Path, *, model_folder: Path | None = None, recipe: QuantRecipe | None = None
) -> PackedCheckpoint:
    """Read what a packed checkpoint says of itself and make sure that all of it is there.

    Args:
        model_folder: the model it is wanted for, and
        recipe: the recipe, both only named in the command an error recommends.

    Raises:
        WeightsError: it is none, lacks a file, or a file was cut (then a tensor is named).
        PackedMismatch: it has another format version.
    """
    command = convert_command(folder, model_folder, recipe)
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
        # To make scales, which that error recommends (a mismatch's, too), would not help: these
        # belong to the files.
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
) -> None:
    """Refuse a packed checkpoint that was made for something else, or whose tensors do not fit.

    Raises:
        PackedMismatch: another model or recipe; the message ends with the command to run.
        WeightsError: naming the tensor that is missing, has another shape or dtype, or is a scale
            that is not the scales file's.
        ConversionError: its recipe does not fit its transformer.
    """
    info, name = packed.info, packed.folder
    problem = None
    if info.model_fingerprint != model_fingerprint:
        problem = (
            f"the packed checkpoint {name} was made of model {info.model_fingerprint}, "
            f"this model is {model_fingerprint}"
        )
    elif info.recipe.fingerprint != recipe.fingerprint:
        problem = (
            f"the packed checkpoint {name} is of recipe {info.recipe.name!r} "
            f"({info.recipe.fingerprint}), this is {recipe.name!r} ({recipe.fingerprint})"
        )
    if problem:
        command = convert_command(name, model_folder, recipe)
        raise PackedMismatch(f"{problem}; make a fitting one with: {command}")
    skeleton = shared_quantized_skeleton(info.transformer_config, info.recipe)
    check_stored(skeleton.state_dict(), packed.stored, source=str(name), exact=True)
    _check_own_scales(packed, convert_command(name, model_folder, recipe))


def _check_own_scales(packed: PackedCheckpoint, command: str) -> None:
    """Hold the scales among its tensors against the scales file, which is known to be whole."""
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
    """Make the quantized transformer alone, on the reader's device. `check_packed` comes first.

    Raises:
        WeightsError: a file cannot be read, or has become shorter.
    """
    skeleton = shared_quantized_skeleton(packed.info.transformer_config, packed.info.recipe)
    transformer = share_tree(skeleton, lambda _name, _module: None)
    return move_buffers(load_weights(transformer, packed.stored, reader), reader.device)


def load_packed_base(packed: Sequence[PackedCheckpoint], reader: Reader) -> WanTransformer3DModel:
    """Make what several packed checkpoints of one model share; the rest stays without weights.

    Their transformers are made beside it, with `load_packed_beside`.

    Raises:
        WeightsError: a file cannot be read, or has become shorter.
    """
    base = empty_transformer(packed[0].info.transformer_config)
    for each in packed:
        twin = quantized_skeleton(base, each.info.recipe)
        shared = stored_state(twin).keys() & stored_state(base).keys()
        load_weights(base, each.stored, reader, shared)
    return move_buffers(base, reader.device)


def load_packed_beside(packed: PackedCheckpoint, transformer: M, reader: Reader) -> M:
    """Make the quantized twin of a transformer that is loaded; only its linears are read.

    They share every other tensor, as `quantize_transformer` has it. `check_packed` comes first.

    Raises:
        ConversionError: the tree carries hooks, or is not of this checkpoint's configuration.
        WeightsError: a file cannot be read, or has become shorter.
    """
    twin = quantized_skeleton(transformer, packed.info.recipe)
    check_stored(stored_state(twin), packed.stored, source=str(packed.folder), exact=True)
    return load_weights(twin, packed.stored, reader)


def convert_command(folder: Path, model_folder: Path | None, recipe: QuantRecipe | None) -> str:
    """The command line that makes a packed checkpoint; what is not known is in upper case."""
    arguments = ["--model", str(model_folder or "MODEL_FOLDER"), "--scales", "SCALES_FILE"]
    if recipe:
        arguments += ["--recipe", recipe.source or recipe.name]
    arguments += ["--out", str(folder)]
    return shlex.join([sys.executable or "python", "-m", "quant", "convert", *arguments])


def _read_info(headers: dict[Path, Header], command: str) -> PackedInfo:
    """Take what all files say of themselves and make sure that they belong together."""
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
