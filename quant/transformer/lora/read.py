"""Read a LoRA's file: what it adds to which tensor of a transformer; refuse what does not fit.

Nothing of a file is left out: each tensor has to have a place, of the right shape, and only finite
numbers. The tensors are read once here, to check and to identify them, and again when they are
merged, so that the host holds those of one place only.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from quant.errors import WeightsError
from quant.transformer.lora.adapter_config import AdapterConfig
from quant.transformer.lora.names import Part, Place, TargetNames
from quant.transformer.lora.source import LoraSource
from quant.weights.header import StoredTensor, read_header
from quant.weights.reader import TensorReader

_FOREIGN = (
    (r"k_img|v_img|img_emb|add_[kv]_proj|image_embedder", "an image-to-video model"),
    (r"vace_|face_adapter|motion_encoder|audio", "another model of Wan's family"),
    (r"lora_te|text_encoder", "a text encoder as well, which is not changed here"),
    (r"dora_scale|lora_magnitude_vector", "a kind that is not read (DoRA)"),
    (r"hada_|lokr_|oft_|glora|lora_mid", "a kind that is not read (LyCORIS)"),
)
"""What names that have no place show of a file."""
_ALPHA_TOLERANCE = 0.01
"""Of a tensor's alpha, which may be rounded to BF16, and the same in a configuration."""


@dataclass(frozen=True, slots=True)
class Update:
    """One change of a tensor: the product of two factors, or a difference.

    Attributes:
        factor: multiplies the change, besides the LoRA's scale.
        tensors: (up [out, rank, 1 …], down [rank, in …]), or (difference,) of the tensor's shape.
    """

    factor: float
    tensors: tuple[StoredTensor, ...]

    def add_to(self, total: Tensor, scale: float) -> None:
        """Add the change, times `scale`, to a contiguous float32 tensor in place.

        Raises:
            WeightsError: the file cannot be read or has become shorter.
        """
        read = _read(self.tensors, total.device)
        if len(read) == 1:
            total.add_(read[0], alpha=scale * self.factor)
        else:
            up, down = (each.flatten(1) for each in read)
            total.flatten(1).addmm_(up, down, alpha=scale * self.factor)


@dataclass(frozen=True, slots=True)
class Lora:
    """A LoRA whose file has been checked against a transformer.

    Attributes:
        updates: by the name of the tensor that they change.
        digest: SHA-256 of its tensors, their factors and the scale, whatever format they are in.
    """

    source: LoraSource
    updates: Mapping[str, tuple[Update, ...]]
    digest: str


def read_lora(source: LoraSource, required: Mapping[str, Tensor]) -> Lora:
    """Read and check a LoRA for the transformer with the state dict `required`.

    Raises:
        WeightsError: the file cannot be read or is empty; or a tensor has no place, lacks its other
            half, or has another shape or type, or NaN or infinity. The message names the first such
            tensor, and how many others there are.
    """
    file = source.file()
    header = read_header(file)
    if not header.tensors:
        raise WeightsError(f"the LoRA {file} holds no tensors: copy or save it again")
    places = _places(file, header.tensors, required)
    config = AdapterConfig.read(file, header.metadata)
    _check_types(file, places)
    _check_shapes(file, places, required)
    updates: dict[str, list[Update]] = {}
    for target, parts in places.items():
        found = updates.setdefault(target, [])
        if "up" in parts:
            up, down = parts["up"].stored, parts["down"].stored
            found.append(Update(_factor(file, parts, config), (up, down)))
        if "diff" in parts:
            found.append(Update(1.0, (parts["diff"].stored,)))
    checked = {target: tuple(found) for target, found in updates.items()}
    return Lora(source, checked, _digest(file, checked, source.scale))


@dataclass(frozen=True, slots=True)
class _Found:
    stored: StoredTensor
    place: Place


_Parts = dict[Part, _Found]


def _places(
    file: Path, tensors: Iterable[StoredTensor], required: Mapping[str, Tensor]
) -> dict[str, _Parts]:
    """Sort a file's tensors by their target; refuse those without one, and incomplete pairs."""
    names, places, unknown, twice = TargetNames(required), dict[str, _Parts](), [], []
    for stored in tensors:
        place = names.find(stored.name)
        if place is None:
            unknown.append(stored.name)
            continue
        parts = places.setdefault(place.target, {})
        if place.part in parts:
            twice.append(stored.name)
        parts[place.part] = _Found(stored, place)
    if unknown:
        raise WeightsError(
            f"the LoRA {file} holds tensor {unknown[0]!r}{_others(unknown)}, for which this "
            f"transformer has no place{_origin(unknown)}: give a LoRA of this very Wan2.1 "
            "text-to-video model"
        )
    if twice:
        raise WeightsError(
            f"the LoRA {file} holds tensor {twice[0]!r}{_others(twice)}, which changes what "
            "another tensor in it changes already: give a file with one LoRA"
        )
    halves = [
        found.stored.name
        for parts in places.values()
        for part, found in parts.items()
        if part != "diff" and not {"up", "down"} <= parts.keys()
    ]
    if halves:
        raise WeightsError(
            f"the LoRA {file} holds tensor {halves[0]!r}{_others(halves)}, without the other "
            "half of its pair: copy or save it again"
        )
    return places


def _others(wrong: Sequence[object]) -> str:
    more = len(wrong) - 1
    return f", and {more} other{'s' * (more > 1)}" if more else ""


def _origin(names: Iterable[str]) -> str:
    """Say what a file seems to be of, by the names of its tensors that have no place."""
    joined = "\n".join(names)
    return next((f"; it is of {what}" for mark, what in _FOREIGN if re.search(mark, joined)), "")


def _check_types(file: Path, places: Mapping[str, _Parts]) -> None:
    wrong = [
        found.stored
        for parts in places.values()
        for part, found in parts.items()
        if not _is_read(part, found.stored.dtype)
    ]
    if wrong:
        raise WeightsError(
            f"tensor {wrong[0].name!r} of the LoRA {file} holds {wrong[0].dtype}{_others(wrong)}, "
            "which is not read: give the LoRA in BF16, F16 or F32"
        )


def _is_read(part: Part, dtype: torch.dtype) -> bool:
    if part == "alpha":
        return not dtype.is_complex  # some tools write an integer
    return dtype.is_floating_point and dtype.itemsize > 1


def _check_shapes(file: Path, places: Mapping[str, _Parts], required: Mapping[str, Tensor]) -> None:
    """Refuse tensors that do not make a change of their target's shape."""
    wrong = [
        (found.stored, target)
        for target, parts in places.items()
        for part, found in parts.items()
        if not _fits(part, parts, tuple(required[target].shape))
    ]
    if wrong:
        stored, target = wrong[0]
        raise WeightsError(
            f"tensor {stored.name!r} of the LoRA {file} has the shape {list(stored.shape)}, which "
            f"does not fit {target} of shape {list(required[target].shape)}{_others(wrong)}: give "
            "a LoRA of this very model; one of another size does not fit"
        )


def _fits(part: Part, parts: _Parts, shape: tuple[int, ...]) -> bool:
    """Return whether a part of a change has the shape that the target's and the rank demand."""
    own = parts[part].stored.shape
    if part == "alpha":
        return own in ((), (1,))
    if part == "diff":
        return own == shape
    down = parts["down"].stored.shape
    if len(shape) < 2 or not down or not down[0]:
        return False
    expected = {"down": (*down[:1], *shape[1:]), "up": (shape[0], down[0], *(1 for _ in shape[2:]))}
    return own == expected[part]


def _factor(file: Path, parts: _Parts, config: AdapterConfig) -> float:
    """Return what a product is multiplied by; refuse a rank or alpha that its files contradict."""
    down = parts["down"]
    rank, module = down.stored.shape[0], down.place.module
    said = config.rank_of(module)
    if said is not None and said != rank:
        raise WeightsError(
            f"tensor {down.stored.name!r} of the LoRA {file} has rank {rank}, and its "
            f"configuration says {said:g}: they are of different trainings; copy both again"
        )
    factor = config.factor(module, rank)
    if "alpha" not in parts:
        return 1.0 if factor is None else factor
    stored = parts["alpha"].stored
    (alpha,) = _read([stored], torch.device("cpu"))
    if not alpha.isfinite().all():
        raise _not_finite(file, [stored.name])
    own = alpha.item() / rank
    if factor is not None and not math.isclose(own, factor, rel_tol=_ALPHA_TOLERANCE):
        raise WeightsError(
            f"tensor {stored.name!r} of the LoRA {file} multiplies by {own:g}, and its "
            f"configuration by {factor:g}: they are of different trainings; copy both again"
        )
    return own


def _digest(file: Path, updates: Mapping[str, Iterable[Update]], scale: float) -> str:
    """Hash what a LoRA adds, and refuse what is not finite."""
    digest = hashlib.sha256(f"scale {scale!r}\n".encode())
    reader, wrong = TensorReader(torch.device("cpu")), list[str]()
    for target in sorted(updates):
        for update in updates[target]:
            tensors = [torch.empty(each.shape, dtype=each.dtype) for each in update.tensors]
            reader.read(zip(update.tensors, tensors, strict=True))
            for stored, tensor in zip(update.tensors, tensors, strict=True):
                if not tensor.isfinite().all():
                    wrong.append(stored.name)
                fields = (target, update.factor, stored.dtype, stored.shape)
                digest.update(f"{fields!r}\n".encode())
                digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    if wrong:
        raise _not_finite(file, wrong)
    return digest.hexdigest()


def _not_finite(file: Path, names: list[str]) -> WeightsError:
    return WeightsError(
        f"tensor {names[0]!r} of the LoRA {file} holds NaN or infinity{_others(names)}: the file "
        "is damaged, or its training failed; copy it again, or give another"
    )


def _read(wanted: Iterable[StoredTensor], device: torch.device) -> list[Tensor]:
    """Read tensors as float32."""
    requests = [
        (each, torch.empty(each.shape, dtype=torch.float32, device=device)) for each in wanted
    ]
    TensorReader(device).read(requests)
    return [tensor for _, tensor in requests]
