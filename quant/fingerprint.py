"""Which model a file was made for, told from the model's files rather than from their names."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, BinaryIO

from quant.errors import QuantError

FULL_HASH_LIMIT_BYTES = 1 << 30
_MIB = 1 << 20


def model_fingerprint(folder: Path) -> str:
    """Fingerprint the transformer of a pipeline folder: its configuration and its weights.

    SHA-256 over the configuration (keys that begin with "_", which say who saved it, left out) and
    over the safetensors files of `folder/transformer` in the order of their names. Up to 1 GiB of
    weights every byte counts, and the result begins with "sha256-full:". Beyond that only each
    file's size, header, first and last MiB do, so that a 28 GB model starts without being read
    twice; the result then begins with "sha256-sampled:", and a change deep inside a file goes
    unseen.

    Raises:
        QuantError: the folder holds no transformer in diffusers format, or a file of it cannot be
            read.
    """
    values = read_transformer_config(folder)
    weights = sorted((folder / "transformer").glob("*.safetensors"))
    if not weights:
        raise _not_a_pipeline(folder)
    values = {key: value for key, value in values.items() if not key.startswith("_")}
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
    try:
        sampled = sum(file.stat().st_size for file in weights) > FULL_HASH_LIMIT_BYTES
        for file in weights:
            _update(digest, file, sampled)
    except OSError as error:
        raise QuantError(f"{error.filename} cannot be read: {error.strerror}") from error
    return f"sha256-{'sampled' if sampled else 'full'}:{digest.hexdigest()}"


def read_transformer_config(folder: Path) -> dict[str, Any]:
    """Read the configuration of a pipeline's transformer.

    Raises:
        QuantError: there is none, or it cannot be read.
    """
    file = folder / "transformer" / "config.json"
    if not file.is_file():
        raise _not_a_pipeline(folder)
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise QuantError(f"{file} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise QuantError(f"{file} holds a {type(values).__name__}, not a JSON object")
    return values


def _not_a_pipeline(folder: Path) -> QuantError:
    return QuantError(
        f"{folder} is not a pipeline in diffusers format: it lacks transformer/config.json or "
        "transformer/*.safetensors; give the folder that holds model_index.json"
    )


def _update(digest: hashlib._Hash, file: Path, sampled: bool) -> None:
    size_bytes = file.stat().st_size
    digest.update(f"{file.name}:{size_bytes}".encode())
    with file.open("rb") as stream:
        if sampled:
            _update_sampled(digest, stream, size_bytes)
        else:
            while chunk := stream.read(_MIB):
                digest.update(chunk)


def _update_sampled(digest: hashlib._Hash, stream: BinaryIO, size_bytes: int) -> None:
    header_bytes = int.from_bytes(stream.read(8), "little")  # safetensors begins with its length
    digest.update(stream.read(min(header_bytes, size_bytes)))
    digest.update(stream.read(_MIB))
    stream.seek(max(0, size_bytes - _MIB))
    digest.update(stream.read(_MIB))
