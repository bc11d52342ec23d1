"""Compute a fingerprint that identifies a model by its files.

Scales files, packed checkpoints and videos name the model they were made for by this fingerprint.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from quant.errors import QuantError
from quant.weights.header import read_header
from quant.weights.layouts import refuse_other_forms
from quant.weights.weight_files import weight_files

FULL_HASH_LIMIT_BYTES = 1 << 30
_MIB = 1 << 20
VAE_FULL_HASH_LIMIT_BYTES = 64 * _MIB
_MAX_HEADER_BYTES = 100 * _MIB  # safetensors' own bound
_TRANSFORMER = "transformer/config.json"
_VAE_CONFIG = "vae/config.json"
_CONFIGS = (
    "model_index.json",
    _TRANSFORMER,
    "text_encoder/config.json",
    _VAE_CONFIG,
    "scheduler/scheduler_config.json",
)
_TOKENIZER = "tokenizer/tokenizer.json"
_OTHER_WEIGHTS = ("text_encoder", "vae")
_WEIGHTS = ("transformer", *_OTHER_WEIGHTS)
_LORAS = "+loras-sha256-v1:"


def model_fingerprint(folder: Path) -> str:
    """Compute a pipeline folder's fingerprint: a SHA-256 over the files that determine its videos.

    It covers more than the transformer. Scales depend on the activations of its linears, and so on
    tokenizer, text encoder and scheduler. Videos with equal fingerprints and requests should be
    equal, which depends on the VAE as well.

    These are hashed, in this order:

    - model_index.json, which names the scheduler's class, and the configurations of transformer,
      text encoder, VAE and scheduler, without the keys about the software that saved them;
    - tokenizer.json;
    - the safetensors files of transformer, text encoder and VAE that are read
      (`quant.weights.weight_files`), sorted by name.

    Up to 1 GiB of weights, every byte is hashed and the result begins with "sha256-full-v2:".
    Above, only the size, header, first MiB and last MiB of each file are hashed, so that the start
    with a 28 GB model does not read it twice. The result then begins with "sha256-sampled-v2:", and
    a change in the middle of a file is not detected.

    Version 1 covered only the transformer. Because of the "v2" a version 1 fingerprint is
    recognised as outdated, and not taken for that of another model.

    Raises:
        QuantError: the folder lacks a part of a pipeline in diffusers format, or a file of it
            cannot be read.
        WeightsError: a file of weights is truncated.
    """
    return _fingerprint(folder, _WEIGHTS)


def parts_fingerprint(folder: Path) -> str:
    """Compute the same fingerprint without the transformer's weights, which may be absent.

    A packed checkpoint stores both fingerprints. This one shows whether it is used with the text
    encoder, VAE, tokenizer and scheduler that it was made for.

    Raises:
        QuantError, WeightsError: as `model_fingerprint`.
    """
    return _fingerprint(folder, _OTHER_WEIGHTS)


def with_loras(fingerprint: str, digest: str | None) -> str:
    """Return the fingerprint of a model with LoRAs merged; the model's own for None.

    Args:
        fingerprint: of the model without them.
        digest: SHA-256 of the LoRAs (`quant.transformer.lora.merge.LoraSet`).
    """
    return fingerprint if digest is None else f"{fingerprint}{_LORAS}{digest}"


def without_loras(fingerprint: str) -> str:
    """Return the fingerprint of the model that LoRAs were merged into, or that had none."""
    return fingerprint.partition(_LORAS)[0]


def other_model(made_for: str, found: str) -> str:
    """Say what differs between two fingerprints, after words like "they were made for"."""
    if without_loras(made_for) != without_loras(found):
        return f"model {made_for}, this model is {found}"
    loras = [each.partition(_LORAS)[2] for each in (made_for, found)]
    had, has = (f"the LoRAs {each[:12]}" if each else "no LoRA" for each in loras)
    return f"this model with {had}, and it has {has} here"


def vae_fingerprint(folder: Path) -> str:
    """Compute a fingerprint of a pipeline's VAE alone: its configuration and its weights.

    Files of more than 64 MiB are sampled as by `model_fingerprint`, so that a start reads little.

    Raises:
        QuantError, WeightsError: as `model_fingerprint`.
    """
    config, weights = folder / _VAE_CONFIG, weight_files(folder / "vae")
    if not config.is_file() or not weights:
        raise _not_a_pipeline(folder, [_VAE_CONFIG, "vae/*.safetensors"])
    digest = hashlib.sha256()
    values = _without_origin(_read_object(config))
    _update(digest, _VAE_CONFIG, json.dumps(values, sort_keys=True).encode())
    try:
        sampled = sum(file.stat().st_size for file in weights) > VAE_FULL_HASH_LIMIT_BYTES
        for file in weights:
            read_header(file)
            content = _sample(file) if sampled else _hash_all(file)
            _update(digest, f"vae/{file.name}:{file.stat().st_size}", content)
    except OSError as error:
        raise QuantError(f"{error.filename} cannot be read: {error.strerror}") from error
    return f"vae-sha256-{'sampled' if sampled else 'full'}-v1:{digest.hexdigest()}"


def has_transformer_weights(folder: Path) -> bool:
    """Return whether a folder holds its transformer's weights, which packed modes do not need."""
    return bool(weight_files(folder / "transformer"))


def _fingerprint(folder: Path, components: tuple[str, ...]) -> str:
    missing = [part for part in (*_CONFIGS, _TOKENIZER) if not (folder / part).is_file()]
    weights_of = {each: weight_files(folder / each) for each in components}
    missing += [f"{each}/*.safetensors" for each, files in weights_of.items() if not files]
    if missing:
        for part in missing:
            if part == _TOKENIZER or part.endswith("*.safetensors"):
                refuse_other_forms((folder / part).parent)
        raise _not_a_pipeline(folder, missing)
    digest = hashlib.sha256()
    for config in _CONFIGS:
        values = _without_origin(_read_object(folder / config))
        _update(digest, config, json.dumps(values, sort_keys=True).encode())
    weights = [file for files in weights_of.values() for file in files]
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
    """Remove the keys that say which software saved a configuration, and from which path."""
    return {
        key: value
        for key, value in values.items()
        if key == "_class_name" or not (key.startswith("_") or key == "transformers_version")
    }


def _update(digest: hashlib._Hash, name: str, content: bytes) -> None:
    """Hash a name, the length of a content, and the content, so that no two pairs hash alike."""
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
