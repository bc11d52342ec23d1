"""Which model a file was made for, told from the model's files rather than from their names."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from quant.errors import QuantError
from quant.weights.header import read_header

FULL_HASH_LIMIT_BYTES = 1 << 30
_MIB = 1 << 20
_MAX_HEADER_BYTES = 100 * _MIB  # safetensors' own bound
_TRANSFORMER = "transformer/config.json"
_CONFIGS = (
    "model_index.json",
    _TRANSFORMER,
    "text_encoder/config.json",
    "vae/config.json",
    "scheduler/scheduler_config.json",
)
_TOKENIZER = "tokenizer/tokenizer.json"
_TRANSFORMER_WEIGHTS = "transformer/*.safetensors"
_OTHER_WEIGHTS = ("text_encoder/*.safetensors", "vae/*.safetensors")
_WEIGHTS = (_TRANSFORMER_WEIGHTS, *_OTHER_WEIGHTS)


def model_fingerprint(folder: Path) -> str:
    """Fingerprint a pipeline folder: whatever decides what a request's video looks like.

    That is more than the transformer. Scales fit the activations its linears see, which depend on
    tokenizer, text encoder and scheduler; and whoever finds the fingerprint in a video's metadata
    takes it that the same request gives the same video, which depends on the VAE as well.

    SHA-256 over the configurations of transformer, text encoder, VAE and scheduler and over
    model_index.json, which names the scheduler's class (keys that say who saved them left out);
    over tokenizer.json; and over the safetensors files of transformer, text encoder and VAE in the
    order of their names. Up to 1 GiB of weights every byte counts, and the result begins with
    "sha256-full-v2:". Beyond that only each file's size, header, first and last MiB do, so that a
    28 GB model starts without being read twice; the result then begins with "sha256-sampled-v2:",
    and a change deep inside a file goes unseen.

    "v2", because until then only the transformer was covered: a file with an older fingerprint is
    seen to be old, rather than made for another model.

    Raises:
        QuantError: the folder lacks a part of a pipeline in diffusers format, or a file of it
            cannot be read.
        WeightsError: a file of weights was cut, which would make another model of it.
    """
    return _fingerprint(folder, _WEIGHTS)


def parts_fingerprint(folder: Path) -> str:
    """Fingerprint a pipeline folder but for the transformer's weights, which need not be there.

    Computed as `model_fingerprint`: a packed checkpoint bears both, and this one shows that it
    meets the text encoder, VAE, tokenizer and scheduler it was made beside.

    Raises:
        QuantError: as `model_fingerprint`.
    """
    return _fingerprint(folder, _OTHER_WEIGHTS)


def has_transformer_weights(folder: Path) -> bool:
    """Whether a pipeline folder holds its transformer, or only what goes with a packed one."""
    return any(folder.glob(_TRANSFORMER_WEIGHTS))


def _fingerprint(folder: Path, patterns: tuple[str, ...]) -> str:
    missing = [part for part in (*_CONFIGS, _TOKENIZER) if not (folder / part).is_file()]
    missing += [pattern for pattern in patterns if not any(folder.glob(pattern))]
    if missing:
        raise _not_a_pipeline(folder, missing)
    digest = hashlib.sha256()
    for config in _CONFIGS:
        values = _without_origin(_read_object(folder / config))
        _update(digest, config, json.dumps(values, sort_keys=True).encode())
    weights = [file for pattern in patterns for file in sorted(folder.glob(pattern))]
    for file in weights:
        read_header(file)
    try:
        _update(digest, _TOKENIZER, (folder / _TOKENIZER).read_bytes())
        sampled = sum(file.stat().st_size for file in weights) > FULL_HASH_LIMIT_BYTES
        for file in weights:
            content = _sample(file) if sampled else _hash_all(file)
            _update(digest, f"{file.parent.name}/{file.name}:{file.stat().st_size}", content)
    except OSError as error:
        raise QuantError(f"{error.filename} cannot be read: {error.strerror}") from error
    return f"sha256-{'sampled' if sampled else 'full'}-v2:{digest.hexdigest()}"


def read_transformer_config(folder: Path) -> dict[str, Any]:
    """Read the configuration of a pipeline's transformer.

    Raises:
        QuantError: there is none, or it cannot be read.
    """
    if not (folder / _TRANSFORMER).is_file():
        raise _not_a_pipeline(folder, [_TRANSFORMER])
    return _read_object(folder / _TRANSFORMER)


def _not_a_pipeline(folder: Path, missing: list[str]) -> QuantError:
    return QuantError(
        f"{folder} is not a pipeline in diffusers format: it lacks {', '.join(missing)}; "
        "give the folder that holds model_index.json"
    )


def _read_object(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise QuantError(f"{file} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise QuantError(f"{file} holds a {type(values).__name__}, not a JSON object")
    return values


def _without_origin(values: dict[str, Any]) -> dict[str, Any]:
    """The values that a model is built from: not those that say by what and from where it came."""
    return {
        key: value
        for key, value in values.items()
        if key == "_class_name" or not (key.startswith("_") or key == "transformers_version")
    }


def _update(digest: hashlib._Hash, name: str, content: bytes) -> None:
    """Take in a name and a content so that no other pair gives the same bytes."""
    digest.update(f"{name}:{len(content)}:".encode())
    digest.update(content)


def _hash_all(file: Path) -> bytes:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()


def _sample(file: Path) -> bytes:
    with file.open("rb") as stream:
        header_bytes = int.from_bytes(stream.read(8), "little")  # safetensors begins with it
        header = stream.read(min(header_bytes, _MAX_HEADER_BYTES))
        first = stream.read(_MIB)
        stream.seek(max(0, file.stat().st_size - _MIB))
        return header + first + stream.read(_MIB)
