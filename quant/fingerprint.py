"""Which model a file was made for, told from the model's files rather than from their names."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import BinaryIO

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
        QuantError: the folder holds no transformer in diffusers format.
    """
    transformer = folder / "transformer"
    config = transformer / "config.json"
    weights = sorted(transformer.glob("*.safetensors"))
    if not config.is_file() or not weights:
        raise QuantError(
            f"{folder} is not a pipeline in diffusers format: it lacks transformer/config.json or "
            "transformer/*.safetensors; give the folder that holds model_index.json"
        )
    values = json.loads(config.read_text(encoding="utf-8"))
    values = {key: value for key, value in values.items() if not key.startswith("_")}
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
    sampled = sum(file.stat().st_size for file in weights) > FULL_HASH_LIMIT_BYTES
    for file in weights:
        digest.update(f"{file.name}:{file.stat().st_size}".encode())
        with file.open("rb") as stream:
            if sampled:
                _update_sampled(digest, stream, file.stat().st_size)
            else:
                while chunk := stream.read(_MIB):
                    digest.update(chunk)
    return f"sha256-{'sampled' if sampled else 'full'}:{digest.hexdigest()}"


def _update_sampled(digest: hashlib._Hash, stream: BinaryIO, size_bytes: int) -> None:
    header_bytes = int.from_bytes(stream.read(8), "little")  # safetensors begins with its length
    digest.update(stream.read(min(header_bytes, size_bytes)))
    digest.update(stream.read(_MIB))
    stream.seek(max(0, size_bytes - _MIB))
    digest.update(stream.read(_MIB))
