"""Write a packed checkpoint: quantize a transformer's linears once, so that workers only copy.

The BF16 weights are processed tensor by tensor, so memory only has to hold the largest tensor.
`quant.packed.format` describes the files. The checkpoint is written atomically: into a hidden
folder with the same parent, which is synced to disk and then renamed.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from quant.calibration.calibrate import tool_version
from quant.calibration.scales import Scales, check_scales, load_scales
from quant.errors import WeightsError
from quant.packed.format import SCALES_FILE, PackedInfo, scales_origin, shard_name
from quant.recipe.recipe import QuantRecipe
from quant.recipe.selection import select_linears
from quant.transformer.lora.merge import NO_LORAS, LoraSet
from quant.transformer.meta_model import check_stored, empty_transformer, quantized_meta_model
from quant.transformer.quantize import require_scales
from quant.transformer.quantized_linear import quantize_weight
from quant.weights.fingerprint import model_fingerprint, parts_fingerprint, read_transformer_config
from quant.weights.header import StoredTensor
from quant.weights.model_folder import check_model_kind
from quant.weights.new_folder import check_new_folder, check_room, new_folder, sync
from quant.weights.reader import TensorReader
from quant.weights.weight_files import stored_weights
from quant.weights.writer import spec_of, split_into_shards, write_safetensors

SHARD_BYTES = 5_000_000_000

OnTensor = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class PackedReport:
    """The result of a conversion.

    Attributes:
        weight_bytes: bytes of all tensors.
        file_bytes: bytes of all files in the folder.
        source_bytes: bytes of the transformer in BF16.
    """

    linears: int
    tensors: int
    shards: int
    weight_bytes: int
    file_bytes: int
    source_bytes: int

    def __str__(self) -> str:
        return (
            f"{self.linears} linears packed, {self.tensors} tensors in {self.shards} files, "
            f"{self.weight_bytes:,} bytes of weights instead of {self.source_bytes:,}"
        )


def convert(  # noqa: PLR0913 (input, output, and settings)
    model_folder: Path,
    recipe: QuantRecipe,
    scales_file: Path,
    out: Path,
    *,
    device: torch.device | None = None,
    loras: LoraSet = NO_LORAS,
    shard_bytes: int = SHARD_BYTES,
    on_tensor: OnTensor = lambda done, total: None,
) -> PackedReport:
    """Write the packed checkpoint of `recipe` into the new folder `out`.

    Args:
        device: where linears are quantized; the codes are the same on every device.
        loras: merged before anything is quantized, on that device.
        on_tensor: called after each tensor with (done, total).

    Raises:
        WeightsError: `out` exists, does not fit on its disk or cannot be written; or a tensor of
            the model is missing or differs from the configuration.
        ScalesMismatch: the scales were made for another model or recipe.
        QuantError: the folder, the recipe or the scales cannot be read or do not fit.
    """
    check_new_folder(out)
    check_model_kind(model_folder)
    fingerprint = loras.fingerprint(model_fingerprint(model_folder))
    scales = load_scales(
        scales_file, model_folder=model_folder, recipe=recipe, loras=loras.arguments
    )
    recipe = check_scales(
        scales,
        model_fingerprint=fingerprint,
        recipe=recipe,
        path=scales_file,
        model_folder=model_folder,
        loras=loras.arguments,
    )
    packing = _Packing(model_folder, recipe, scales, device or torch.device("cpu"), loras)
    check_room(out, packing.packed_bytes)
    info = PackedInfo(
        model_fingerprint=fingerprint,
        parts_fingerprint=parts_fingerprint(model_folder),
        recipe=recipe,
        transformer_config=packing.config,
        scales_sha256=file_sha256(scales_file),
        scales_from=scales_origin(
            scales.prompts_file, scales.prompts_sha256, scales.sampler, scales.tool_version
        ),
        tool_version=tool_version(),
    )
    try:
        return _write_folder(packing, info, scales_file, out, shard_bytes, on_tensor)
    except OSError as error:
        raise WeightsError(f"cannot write {out}: {error.strerror or error}") from error


def file_sha256(file: Path) -> str:
    """Return the SHA-256 of a small file, in hexadecimal.

    Raises:
        WeightsError: the file cannot be read.
    """
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        raise WeightsError(f"{file} cannot be read: {error.strerror or error}") from error


class _Packing:
    """The tensors of a packed checkpoint, computed one by one from the source's files."""

    def __init__(
        self,
        model_folder: Path,
        recipe: QuantRecipe,
        scales: Scales,
        device: torch.device,
        loras: LoraSet,
    ) -> None:
        self.config = read_transformer_config(model_folder)
        source = empty_transformer(self.config)
        self.linears = select_linears(source, recipe)
        require_scales(self.linears, recipe, scales)
        folder = model_folder / "transformer"
        self.stored = stored_weights(folder)
        self._source = source.state_dict()
        check_stored(self._source, self.stored, source=str(folder), exact=False)
        self.state = quantized_meta_model(source, recipe).state_dict()
        self._recipe, self._scales = recipe, scales
        self._reader = TensorReader(torch.device("cpu"))
        self._device = device
        self._loras = loras

    @property
    def source_bytes(self) -> int:
        """Return the bytes of the transformer in BF16."""
        return sum(tensor.nbytes for tensor in self._source.values())

    @property
    def packed_bytes(self) -> int:
        """Return the bytes of the tensors that are written."""
        return sum(tensor.nbytes for tensor in self.state.values())

    def make(self, name: str) -> Tensor:
        """Compute a tensor of the packed checkpoint by its name there."""
        linear, _, kind = name.rpartition(".")
        if linear in self.linears and kind != "bias":
            scales = self._scales
            if kind == "weight_qdata":
                weight = self._read(f"{linear}.weight").to(self._device)
                scale = scales.weight_scale[linear].to(self._device)
                return quantize_weight(linear, weight, scale, self._recipe)
            return (scales.weight_scale if kind == "weight_scale" else scales.act_scale)[linear]
        return self._read(name)

    def _read(self, name: str) -> Tensor:
        stored: StoredTensor = self.stored[name]
        source = self._source[name]
        tensor = torch.empty(source.shape, dtype=source.dtype)
        self._reader.read([(stored, tensor)])
        if name in self._loras.names:
            tensor = self._loras.merged(name, tensor.to(self._device))
        return tensor


def _write_folder(
    packing: _Packing,
    info: PackedInfo,
    scales_file: Path,
    out: Path,
    shard_bytes: int,
    on_tensor: OnTensor,
) -> PackedReport:
    specs = [spec_of(name, tensor) for name, tensor in packing.state.items()]
    shards = list(split_into_shards(specs, shard_bytes))
    done = written = 0

    def make(name: str) -> Tensor:
        nonlocal done
        tensor = packing.make(name)
        done += 1
        on_tensor(done, len(specs))
        return tensor

    with new_folder(out) as folder:
        for number, shard in enumerate(shards, 1):
            metadata = info.to_metadata() | {"shard": f"{number} of {len(shards)}"}
            file = folder / shard_name(number, len(shards))
            written += write_safetensors(file, shard, metadata, make)
        shutil.copyfile(scales_file, folder / SCALES_FILE)
        sync(folder / SCALES_FILE)
    return PackedReport(
        linears=len(packing.linears),
        tensors=len(specs),
        shards=len(shards),
        weight_bytes=packing.packed_bytes,
        file_bytes=written + scales_file.stat().st_size,
        source_bytes=packing.source_bytes,
    )
