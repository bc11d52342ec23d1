"""Read the headers of safetensors files: dtype, shape and byte range of each tensor.

The safetensors library maps a file and returns tensors on the host. To copy weights to a device, or
to compute how much memory a model needs, the headers are enough. A file that is shorter than its
header says is refused here, with the name of the first incomplete tensor.
"""

from __future__ import annotations

import json
import math
import reprlib
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
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
SMALL_BYTES = 1 << 20
"""Below this size the overhead per tensor costs more time than copying the bytes."""
_LENGTH_BYTES = 8
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_MAX_HEADER_BYTES = 100 << 20  # safetensors' own bound
_MAX_SIDES = 64  # torch's own bound
_MAX_SIDE = 2**63 - 1  # torch's sides and offsets are 64 bits wide
_MAX_DTYPE_CHARS = 16
_MAX_DIGITS = 20  # those of 2^64, and a sign


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file. `start` is the offset of its first byte from the file's beginning."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    start: int

    @property
    def nbytes(self) -> int:
        """The size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def is_small(self) -> bool:
        """Whether it has fewer than `SMALL_BYTES`."""
        return self.nbytes < SMALL_BYTES

    @property
    def end(self) -> int:
        """The offset of the byte after its last one."""
        return self.start + self.nbytes


@dataclass(frozen=True, slots=True)
class Header:
    """The header of one file: its tensors, in the order of their bytes, and its metadata."""

    tensors: tuple[StoredTensor, ...]
    metadata: dict[str, str]


def read_header(file: Path) -> Header:
    """Read the header of a safetensors file, and check the file's length against it.

    Raises:
        WeightsError: the file cannot be read, is no safetensors file, or is truncated. The message
            then names the first incomplete tensor.
    """
    try:
        status = file.stat()
    except OSError as error:
        raise WeightsError(f"{file} cannot be read: {error.strerror or error}") from error
    return _read_header(file, status.st_size, (status.st_ino, status.st_mtime_ns))


@lru_cache(maxsize=64)
def _read_header(file: Path, size: int, _version: tuple[int, int]) -> Header:
    """Read and check a header; cached, as a worker's start reads each one several times.

    It needs them for the fingerprint, for the memory plan and to read the weights.
    """
    try:
        with file.open("rb") as stream:
            first_bytes = stream.read(len(_LFS_POINTER))
            refuse_lfs_pointer(file, first_bytes)
            length = int.from_bytes(first_bytes[:_LENGTH_BYTES], "little")
            stream.seek(_LENGTH_BYTES)
            if not 2 <= length <= min(size - _LENGTH_BYTES, _MAX_HEADER_BYTES):
                raise WeightsError(
                    f"{file} is not a safetensors file, or not a whole one: it has {size:,} bytes "
                    f"and says that its header has {length:,}; copy it again"
                )
            fields = _parse(stream.read(length))
        metadata = fields.pop("__metadata__", {})
        if not _is_text_to_text(metadata):
            raise ValueError(f"its __metadata__ is {reprlib.repr(metadata)}, not texts by name")
        first = _LENGTH_BYTES + length
        tensors = tuple(_stored(file, first, name, each) for name, each in fields.items())
    except OSError as error:
        raise WeightsError(f"{file} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise WeightsError(
            f"{file} is not a safetensors file: {error}; copy or convert it again"
        ) from error
    tensors = tuple(sorted(tensors, key=lambda each: (each.start, each.nbytes)))
    _check_places(file, first, size, tensors)
    return Header(tensors, metadata)


def refuse_lfs_pointer(file: Path, first_bytes: bytes) -> None:
    """Raise WeightsError if a file begins as a Git LFS pointer does, which stands for a file."""
    if first_bytes.startswith(_LFS_POINTER):
        raise WeightsError(
            f"{file} is a Git LFS pointer and not the file itself: run `git lfs pull` in "
            f"{file.parent}"
        )


def stored_tensors(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """Read the headers of files; return all their tensors by name, in the order of their bytes.

    Raises:
        WeightsError: as `read_header`; or two files have a tensor of one name.
    """
    return tensors_by_name(read_header(file) for file in files)


def tensors_by_name(headers: Iterable[Header]) -> dict[str, StoredTensor]:
    """Collect the tensors of several headers by name, in the order of their bytes.

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
                    "there, or add the index of those that do (*.safetensors.index.json)"
                )
            found[each.name] = each
    return found


def _parse(text: bytes) -> dict[str, Any]:
    """Parse a header. Anything may be in it, so nothing here takes long, whatever it holds."""
    # The format demands the brace. It also keeps `json` from guessing another encoding.
    if not text.startswith(b"{"):
        raise ValueError("its header does not begin with a brace")
    try:
        fields = json.loads(text.decode(), parse_int=_whole_number)
    except UnicodeDecodeError as error:  # whose text would quote the whole header
        raise ValueError(f"its header is not UTF-8 at byte {error.start:,}") from None
    except RecursionError:
        raise ValueError("its header nests deeper than any tensor's description") from None
    except ValueError as error:
        raise ValueError(f"its header cannot be parsed ({error})") from None
    assert isinstance(fields, dict), "what begins with a brace is an object"
    return fields


def _whole_number(digits: str) -> int:
    """Parse a number of the header. Python's time for it grows with the square of its digits."""
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"a number of {len(digits):,} digits is in it")
    return int(digits)


def _is_text_to_text(metadata: object) -> bool:
    return isinstance(metadata, dict) and all(isinstance(each, str) for each in metadata.values())


def _stored(file: Path, first: int, name: str, fields: object) -> StoredTensor:
    shown = reprlib.repr(name)
    if not isinstance(fields, dict) or not fields.keys() >= {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {shown} has no dtype, shape and data_offsets")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or len(dtype) > _MAX_DTYPE_CHARS:
        raise ValueError(f"tensor {shown} has the dtype {reprlib.repr(dtype)}, which is none")
    if dtype not in DTYPES:
        raise WeightsError(
            f"tensor {shown} in {file} has the dtype {dtype}, which is not read here: give the "
            "model in BF16, F16 or F32, as its authors publish it"
        )
    # Checked before anything is multiplied: the product of a million large sides takes minutes.
    if not isinstance(shape, list) or len(shape) > _MAX_SIDES or not _are_sizes(shape):
        raise ValueError(
            f"tensor {shown} has the shape {reprlib.repr(shape)}, and not at most {_MAX_SIDES} "
            "whole numbers below 2^63"
        )
    if not isinstance(offsets, list) or len(offsets) != 2 or not _are_sizes(offsets):
        raise ValueError(
            f"tensor {shown} has the data_offsets {reprlib.repr(offsets)}, and not its first byte "
            "and the one after its last"
        )
    start, end = offsets
    stored = StoredTensor(name, DTYPES[dtype], tuple(shape), file, first + start)
    if end - start != stored.nbytes:
        raise ValueError(
            f"tensor {shown} has {stored.nbytes:,} bytes by its shape and {end - start:,} by its "
            "place"
        )
    return stored


def _are_sizes(numbers: list[Any]) -> bool:
    return all(type(each) is int and 0 <= each <= _MAX_SIDE for each in numbers)


def _check_places(file: Path, first: int, size: int, tensors: Iterable[StoredTensor]) -> None:
    """Check that tensors follow each other without gaps, from the header's end to the file's."""
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
