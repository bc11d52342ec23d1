"""Build Wan transformers on the meta device and load weights into them.

A meta model has the real module tree but no weights. It gives the name, shape and dtype of every
tensor that has to be loaded, before anything is read or allocated, both for the BF16 tree and for
the tree that a recipe makes of it.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from quant.errors import WeightsError
from quant.recipe.recipe import QuantRecipe
from quant.recipe.selection import select_linears
from quant.transformer.module_tree import share_tree
from quant.transformer.quantized_linear import empty_linear
from quant.weights.header import StoredTensor
from quant.weights.layouts import refuse_other_layout
from quant.weights.reader import Reader, ReadRequest

if TYPE_CHECKING:
    from diffusers import WanTransformer3DModel

M = TypeVar("M", bound=nn.Module)

_BLOCK_BYTES = 512  # torch's device allocator rounds every allocation up to a multiple of this


@contextmanager
def without_weights() -> Iterator[None]:
    """Build modules on the meta device within the context, without initializing any weights.

    Buffers are real. The context changes torch and the libraries for the whole process: no other
    thread may build a module meanwhile.
    """
    # Both take seconds to import, so they are imported only when a model is really built.
    from accelerate import init_empty_weights  # noqa: PLC0415
    from transformers.initialization import no_init_weights  # noqa: PLC0415

    with init_empty_weights(include_buffers=False), no_init_weights():
        yield


def empty_transformer(
    config: Mapping[str, Any], dtype: torch.dtype = torch.bfloat16
) -> WanTransformer3DModel:
    """Build a Wan transformer on the meta device, with the dtypes that `from_pretrained` gives.

    Buffers that are computed rather than stored (rotary frequencies) are real, on the CPU.

    Raises:
        WeightsError: no transformer can be built from this configuration.
    """
    return share_tree(shared_meta_model(config, dtype), lambda _name, _module: None)


def shared_meta_model(
    config: Mapping[str, Any], dtype: torch.dtype = torch.bfloat16
) -> WanTransformer3DModel:
    """Return the cached meta model of a configuration, to be inspected or copied but not changed.

    Raises:
        WeightsError: as for `empty_transformer`.
    """
    return _cached_models(json.dumps(config, sort_keys=True), dtype).plain


@dataclass(frozen=True, slots=True)
class _MetaModels:
    """The cached meta models of one configuration; together because they share parameters."""

    plain: WanTransformer3DModel
    quantized: dict[QuantRecipe, WanTransformer3DModel]


@lru_cache(maxsize=2)
def _cached_models(config: str, dtype: torch.dtype) -> _MetaModels:
    return _MetaModels(_build(config, dtype), {})


def _build(config: str, dtype: torch.dtype) -> WanTransformer3DModel:
    # Takes seconds to import, so it is imported only when a model is really built.
    from diffusers import WanTransformer3DModel  # noqa: PLC0415

    settings = json.loads(config)
    count = settings.get("num_layers")
    if not isinstance(count, int) or count < 1:
        raise WeightsError(
            f"the transformer's configuration has num_layers = {count!r}, not a number from 1 up: "
            "take the config.json that came with the weights"
        )
    try:
        with without_weights():
            transformer = WanTransformer3DModel.from_config({**settings, "num_layers": 1})
    except (TypeError, ValueError, KeyError) as error:
        raise WeightsError(
            f"no WanTransformer3DModel can be built from this configuration: {error}"
        ) from error
    fp32_names = set(WanTransformer3DModel._keep_in_fp32_modules or ())
    for name, parameter in transformer.named_parameters():
        in_fp32 = fp32_names.intersection(name.split("."))
        parameter.data = parameter.data.to(torch.float32 if in_fp32 else dtype)
    _repeat_block(transformer.eval(), count)
    return transformer


def _repeat_block(transformer: WanTransformer3DModel, count: int) -> None:
    """Repeat the only block of a transformer: blocks are alike, and constructing one is slow."""
    first = transformer.blocks[0]
    for _ in range(count - 1):
        block = share_tree(first, lambda _name, _module: None)
        for module in block.modules():
            module._parameters = {
                name: None if each is None else nn.Parameter(each)
                for name, each in module._parameters.items()
            }
        transformer.blocks.append(block)
    transformer.register_to_config(num_layers=count)


def quantized_meta_model(transformer: M, recipe: QuantRecipe) -> M:
    """Build the tree that `recipe` makes of a transformer; its quantized linears have no weights.

    Like `quantize_transformer`, it shares all other tensors with the source tree, which may itself
    be a meta model.

    Raises:
        ConversionError: the recipe does not fit the transformer.
    """
    targets = select_linears(transformer, recipe)

    def convert(name: str, _module: nn.Module) -> nn.Module | None:
        return empty_linear(targets[name], recipe) if name in targets else None

    return share_tree(transformer, convert)


def shared_quantized_meta_model(
    config: Mapping[str, Any], recipe: QuantRecipe, dtype: torch.dtype = torch.bfloat16
) -> WanTransformer3DModel:
    """Return the cached `quantized_meta_model` of `shared_meta_model`; it must not be changed.

    Raises:
        WeightsError: as for `empty_transformer`.
        ConversionError: as for `quantized_meta_model`.
    """
    cached = _cached_models(json.dumps(config, sort_keys=True), dtype)
    if recipe not in cached.quantized:
        cached.quantized[recipe] = quantized_meta_model(cached.plain, recipe)
    return cached.quantized[recipe]


def unloaded_state(module: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a tree that have not been loaded yet, by name."""
    return {name: tensor for name, tensor in module.state_dict().items() if tensor.is_meta}


def check_stored(
    required: Mapping[str, Tensor],
    stored: Mapping[str, StoredTensor],
    *,
    source: str,
    exact: bool,
) -> None:
    """Check that files hold every tensor of a tree, with its shape and dtype, and no others.

    Args:
        required: the tree's `state_dict`. A tensor that is there under several names (with
            `keep_vars=True`, the same object) may be stored under any of them.
        source: a name of the files for error messages.
        exact: whether the dtypes must be equal. Otherwise any floating-point dtype may replace
            another, except those of one byte, because their scales would be stored elsewhere.

    Raises:
        WeightsError: naming the first tensor that is missing, has no place in the tree, or has
            another shape or dtype, and how many others.
    """
    held = {id(tensor) for name, tensor in required.items() if name in stored}
    missing = [name for name, tensor in required.items() if id(tensor) not in held]
    if not exact:
        refuse_other_layout(stored.keys() - required.keys(), Path(source))
    if missing:
        raise WeightsError(
            f"{source} lacks tensor {missing[0]!r}, and {len(missing) - 1} others: it is not "
            "whole, or the configuration is of another model; copy the folder again, or take the "
            "config.json that came with the weights"
        )
    extra = [name for name in stored if name not in required]
    if extra:
        raise WeightsError(
            f"{source} holds tensor {extra[0]!r}, and {len(extra) - 1} others, for which its "
            "configuration has no place: take the config.json that came with the weights, or "
            "remove the files that do not belong there"
        )
    present = {stored[name]: tensor for name, tensor in required.items() if name in stored}
    _check_shapes(present)
    for found, tensor in present.items():
        floats = found.dtype.is_floating_point and tensor.is_floating_point()
        convertible = floats and found.dtype.itemsize > 1
        if found.dtype is not tensor.dtype and (exact or not convertible):
            raise WeightsError(
                f"tensor {found.name!r} in {found.file} holds {found.dtype}, not {tensor.dtype}: "
                "give the model as its authors publish it, or make the checkpoint again"
            )


def _check_shapes(present: Mapping[StoredTensor, Tensor]) -> None:
    wrong = [found for found, tensor in present.items() if found.shape != tuple(tensor.shape)]
    if wrong:
        found = wrong[0]
        others = f", and {len(wrong) - 1} others have wrong shapes" if len(wrong) > 1 else ""
        raise WeightsError(
            f"tensor {found.name!r} in {found.file} has shape {list(found.shape)}, not "
            f"{list(present[found].shape)} as the configuration says{others}: take the config.json "
            "that came with the weights"
        )


def load_weights(
    module: M,
    stored: Mapping[str, StoredTensor],
    reader: Reader,
    names: Collection[str] | None = None,
) -> M:
    """Load the weights of a tree on the meta device directly onto the reader's device.

    Tensors that are real already are left as and where they are. Call `check_stored` first.

    Args:
        names: read only these tensors.

    Raises:
        WeightsError: a file cannot be read or has become shorter.
    """
    reader.read(allocate(module, stored, reader.device, names))
    return module


def move_buffers(module: M, device: torch.device) -> M:
    """Move buffers that are computed rather than stored to a device, in place.

    Tensors that have not been loaded yet stay on the meta device. `Module.to` does the same only
    for a tree without meta tensors, and visits every tensor for it.
    """
    for each in module.modules():
        for name, buffer in each._buffers.items():
            if buffer is not None and not buffer.is_meta:
                each._buffers[name] = buffer.to(device)
    return module


def allocate(
    module: nn.Module,
    stored: Mapping[str, StoredTensor],
    device: torch.device,
    names: Collection[str] | None = None,
) -> Iterator[ReadRequest]:
    """Allocate a tree's weights one by one, in file order, as requests for `Reader.read`.

    The small tensors of each file come first, so that they can be read together. Large tensors that
    are adjacent in the file are then adjacent in memory as well. The tree holds the new tensors
    once the iterator is exhausted. A parameter that the tree has under several names is allocated
    once.
    """
    empty = {
        name: tensor
        for name, tensor in module.state_dict(keep_vars=True).items()
        if tensor.is_meta and name in stored and (names is None or name in names)
    }
    _reserve({id(tensor): tensor for tensor in empty.values()}.values(), device)
    allocated: dict[int, Tensor] = {}

    def file_order(name: str) -> tuple[Path, bool, int]:
        each = stored[name]
        return each.file, not each.is_small, each.start

    for name in sorted(empty, key=file_order):
        tensor = empty[name]
        if id(tensor) not in allocated:
            real = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
            if isinstance(tensor, nn.Parameter):
                real = nn.Parameter(real, requires_grad=tensor.requires_grad)
            allocated[id(tensor)] = real
            yield stored[name], real
    for each in module.modules():
        for registry in (each._parameters, each._buffers):
            for name, tensor_or_none in registry.items():
                if id(tensor_or_none) in allocated:
                    registry[name] = allocated[id(tensor_or_none)]  # type: ignore[assignment]


def _reserve(tensors: Iterable[Tensor], device: torch.device) -> None:
    """Make torch's allocator reserve device memory for many tensors at once.

    The memory is freed to the allocator's cache at once and used for the tensors later. Reserving
    separately takes some tenths of a millisecond per large tensor and delays copies meanwhile.
    """
    if device.type != "cpu":
        rounded = (-(-tensor.nbytes // _BLOCK_BYTES) * _BLOCK_BYTES for tensor in tensors)
        torch.empty(sum(rounded), dtype=torch.uint8, device=device)
