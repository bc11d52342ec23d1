"""Write safetensors files one tensor at a time, to save memory.

The safetensors library needs all tensors of a file in memory at once. The format does not: it is a
header with the dtype, shape and byte range of every tensor, all known beforehand, and then the data
in the same order.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from quant.weights.header import NAMES, SMALL_BYTES

_HEADER_MULTIPLE = 64  # a header is padded with blanks to a multiple of this size
Spec = tuple[str, torch.dtype, tuple[int, ...]]
"""A tensor to be written: name, dtype, shape."""


def spec_of(name: str, tensor: Tensor) -> Spec:
    """Return the name, dtype and shape of a tensor, for the header."""
    return name, tensor.dtype, tuple(tensor.shape)


def split_into_shards(specs: Sequence[Spec], shard_bytes: int) -> Iterator[list[Spec]]:
    """Divide tensors, in order, into shards of up to `shard_bytes` each; a larger one is alone.

    Each shard is then sorted: first the large tensors, then the small ones (`SMALL_BYTES`), which
    are thus read together. Within both groups, tensors whose size is no multiple of 16 bytes come
    last, so that those before them begin at multiples of 16.
    """
    shard: list[Spec] = []
    size = 0
    for spec in specs:
        if shard and size + _nbytes(spec) > shard_bytes:
            yield _small_last(shard)
            shard, size = [], 0
        shard.append(spec)
        size += _nbytes(spec)
    if shard:
        yield _small_last(shard)


def write_safetensors(
    file: Path,
    specs: Sequence[Spec],
    metadata: Mapping[str, str],
    make: Callable[[str], Tensor],
    *,
    sync: bool = True,
) -> int:
    """Write one file and return its size in bytes.

    Args:
        make: called once for every name, in order; returns a tensor of the dtype and shape in
            `specs`.
        sync: whether to wait until the file is on disk.

    Raises:
        OSError: the file exists already, or cannot be written.
    """
    with file.open("xb") as stream:
        stream.write(header_of(specs, metadata))
        for name, dtype, shape in specs:
            tensor = make(name)
            assert (tensor.dtype, tuple(tensor.shape)) == (dtype, shape), f"{name} is not its spec"
            stream.write(_data(tensor))
        stream.flush()
        if sync:
            os.fsync(stream.fileno())
        return stream.tell()


def to_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Return the bytes of a safetensors file; equal content gives equal bytes.

    The safetensors library orders the metadata in another way each time.
    """
    # Tensors of large elements come first, so that each begins at a multiple of its element's size.
    ordered = sorted(tensors.items(), key=lambda each: (-each[1].dtype.itemsize, each[0]))
    header = header_of([spec_of(*each) for each in ordered], metadata)
    return b"".join([header, *(_data(tensor) for _, tensor in ordered)])


def write_whole(path: Path, data: bytes) -> None:
    """Write a file whole or not at all, and wait until it is on disk; replaces an older one.

    Raises:
        OSError: the folder does not exist or cannot be written.
    """
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as f:
        try:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
            Path(f.name).chmod(0o644)
            Path(f.name).replace(path)
        except BaseException:  # Ctrl-C, too
            Path(f.name).unlink(missing_ok=True)
            raise


def _data(tensor: Tensor) -> memoryview:
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return data.numpy().data


def header_of(specs: Sequence[Spec], metadata: Mapping[str, str]) -> bytes:
    """Return what precedes the data of a safetensors file: the tensors' places, and metadata."""
    fields: dict[str, object] = {"__metadata__": dict(metadata)}
    start = 0
    for spec in specs:
        name, dtype, shape = spec
        end = start + _nbytes(spec)
        fields[name] = {
            "dtype": NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _HEADER_MULTIPLE)
    return len(text).to_bytes(8, "little") + text


def _small_last(shard: list[Spec]) -> list[Spec]:
    return sorted(shard, key=lambda spec: (_nbytes(spec) < SMALL_BYTES, _nbytes(spec) % 16 != 0))


def _nbytes(spec: Spec) -> int:
    _, dtype, shape = spec
    count = dtype.itemsize
    for side in shape:
        count *= side
    return count
