"""Which tensors lie where in safetensors files, read from their headers alone.

The safetensors library maps a file and hands out tensors on the host. Streaming weights to a device
and adding up what a model will take need only the places: dtype, shape and byte range of each
tensor. A file that is shorter than its header says is refused here, with the tensor's name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from quant.errors import WeightsError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
SMALL_BYTES = 1 << 20
"""Tensors below this are more work by their number than by their bytes."""
_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100 << 20  # safetensors' own bound


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file. `start` is its first byte, counted from the file's beginning."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    start: int

    @property
    def nbytes(self) -> int:
        """How many bytes it takes."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def is_small(self) -> bool:
        """Whether it is more work by its number than by its bytes."""
        return self.nbytes < SMALL_BYTES

    @property
    def end(self) -> int:
        """The byte after its last one."""
        return self.start + self.nbytes


@dataclass(frozen=True, slots=True)
class Header:
    """What one file says of itself."""

    tensors: tuple[StoredTensor, ...]
    metadata: dict[str, str]


def read_header(file: Path) -> Header:
    """Read the header of a safetensors file and hold the file's length against it.

    Raises:
        WeightsError: the file cannot be read, is no safetensors file, or is cut short; then the
            message names the first tensor that is not whole.
    """
    try:
        status = file.stat()
    except OSError as error:
        raise WeightsError(f"{file} cannot be read: {error.strerror or error}") from error
    return _read_header(file, status.st_size, (status.st_ino, status.st_mtime_ns))


@lru_cache(maxsize=64)
def _read_header(file: Path, size: int, _version: tuple[int, int]) -> Header:
    """A start asks for a file's header several times: to name the model, to add up, to read."""
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
            if not 2 <= length <= min(size - _LENGTH_BYTES, _MAX_HEADER_BYTES):
                raise WeightsError(
                    f"{file} is not a safetensors file, or not a whole one: it has {size:,} bytes "
                    f"and says that its header has {length:,}; copy it again"
                )
            fields = json.loads(stream.read(length))
        metadata = fields.pop("__metadata__", {})
        if not isinstance(metadata, dict):
            raise ValueError(f"its __metadata__ is {metadata!r}, not an object")
        first = _LENGTH_BYTES + length
        tensors = tuple(_stored(file, first, name, each) for name, each in fields.items())
    except OSError as error:
        raise WeightsError(f"{file} cannot be read: {error.strerror or error}") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise WeightsError(f"{file} is not a safetensors file: {error!r}") from error
    tensors = tuple(sorted(tensors, key=lambda each: (each.start, each.nbytes)))
    _check_places(file, first, size, tensors)
    return Header(tensors, metadata)


def stored_tensors(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """All tensors of several files, by name, in the order in which they lie there.

    Raises:
        WeightsError: as `read_header`; or two files have a tensor of one name.
    """
    return tensors_by_name(read_header(file) for file in files)


def tensors_by_name(headers: Iterable[Header]) -> dict[str, StoredTensor]:
    """As `stored_tensors`, of headers that have been read.

    Raises:
        WeightsError: two files have a tensor of one name.
    """
    found: dict[str, StoredTensor] = {}
    for header in headers:
        for each in header.tensors:
            if each.name in found:
                raise WeightsError(
                    f"tensor {each.name!r} is in {found[each.name].file.name} and in "
                    f"{each.file.name} of {each.file.parent}: remove the files that do not belong "
                    "there"
                )
            found[each.name] = each
    return found


def _stored(file: Path, first: int, name: str, fields: dict[str, Any]) -> StoredTensor:
    start, end = fields["data_offsets"]
    shape = tuple(int(side) for side in fields["shape"])
    if fields["dtype"] not in DTYPES:
        raise ValueError(f"tensor {name!r} has the dtype {fields['dtype']}, which torch lacks")
    if any(side < 0 for side in shape):
        raise ValueError(f"tensor {name!r} has the shape {list(shape)}")
    stored = StoredTensor(name, DTYPES[fields["dtype"]], shape, file, first + int(start))
    if end - start != stored.nbytes:
        raise ValueError(
            f"tensor {name!r} has {stored.nbytes:,} bytes by its shape and {end - start:,} by its "
            "place"
        )
    return stored


def _check_places(file: Path, first: int, size: int, tensors: Iterable[StoredTensor]) -> None:
    """Tensors lie one behind the other, from the header's end to the file's."""
    at = first
    for each in tensors:
        if each.start != at:
            raise WeightsError(
                f"{file} has tensor {each.name!r} at byte {each.start:,}, where {at:,} is free: "
                "its header is damaged; copy or convert it again"
            )
        at += each.nbytes
        if at > size:
            raise WeightsError(
                f"{file} ends after {size:,} bytes, within tensor {each.name!r}, which reaches to "
                f"{at:,}: the file was cut; copy or convert it again"
            )
    if at != size:
        raise WeightsError(
            f"{file} has {size:,} bytes, and its tensors end at {at:,}: copy or convert it again"
        )
