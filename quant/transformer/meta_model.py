"""Transformers without weights: the real module tree, its parameters on the meta device.

What is to be loaded is known from it before anything is read or allocated: every tensor's name,
shape and dtype, of the BF16 tree and of the tree a recipe makes of it.
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
from quant.numerics.granularity import PerChannel, PerToken
from quant.numerics.linear import Hif8Linear
from quant.recipe.recipe import QuantRecipe
from quant.recipe.selection import select_linears
from quant.transformer.module_tree import share_tree
from quant.weights.header import SMALL_BYTES, StoredTensor
from quant.weights.reader import Reader, ReadRequest

if TYPE_CHECKING:
    from diffusers import WanTransformer3DModel

M = TypeVar("M", bound=nn.Module)

_BLOCK_BYTES = 512  # what torch's allocator on a device gives out multiples of


@contextmanager
def without_weights() -> Iterator[None]:
    """Have modules made within on the meta device, but for buffers, and with nothing drawn.

    It switches torch and the libraries for the whole process: no module may be made elsewhere
    meanwhile.
    """
    # Both take seconds to import, so only when a model is really built.
    from accelerate import init_empty_weights  # noqa: PLC0415
    from transformers.initialization import no_init_weights  # noqa: PLC0415

    with init_empty_weights(include_buffers=False), no_init_weights():
        yield


def empty_transformer(
    config: Mapping[str, Any], dtype: torch.dtype = torch.bfloat16
) -> WanTransformer3DModel:
    """Build a Wan transformer on the meta device, in the dtypes `from_pretrained` would give it.

    Buffers that are computed rather than stored (rotary frequencies) are real, on the host.

    Raises:
        WeightsError: no transformer can be built from this configuration.
    """
    return share_tree(shared_meta_model(config, dtype), lambda _name, _module: None)


def shared_meta_model(
    config: Mapping[str, Any], dtype: torch.dtype = torch.bfloat16
) -> WanTransformer3DModel:
    """As `empty_transformer`, but the same tree each time, to be read or to be made a twin of.

    Raises:
        WeightsError: as `empty_transformer`.
    """
    return _skeletons(json.dumps(config, sort_keys=True), dtype).plain


@dataclass(frozen=True, slots=True)
class _Skeletons:
    """Shared trees of one configuration, kept together as they share parameters."""

    plain: WanTransformer3DModel
    quantized: dict[QuantRecipe, WanTransformer3DModel]


@lru_cache(maxsize=2)
def _skeletons(config: str, dtype: torch.dtype) -> _Skeletons:
    return _Skeletons(_build(config, dtype), {})


def _build(config: str, dtype: torch.dtype) -> WanTransformer3DModel:
    # Takes seconds to import, so only when a model is really built.
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
    kept = set(WanTransformer3DModel._keep_in_fp32_modules or ())
    for name, parameter in transformer.named_parameters():
        wide = kept.intersection(name.split("."))
        parameter.data = parameter.data.to(torch.float32 if wide else dtype)
    _repeat_block(transformer.eval(), count)
    return transformer


def _repeat_block(transformer: WanTransformer3DModel, count: int) -> None:
    """Make a transformer of one block one of many: they are alike, and slow to construct."""
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


def quantized_skeleton(transformer: M, recipe: QuantRecipe) -> M:
    """The tree `recipe` makes of a transformer, with quantized linears that are still empty.

    Like `quantize_transformer` it shares everything else with the first tree, be that real or
    itself without weights.

    Raises:
        ConversionError: the recipe does not fit the transformer.
    """
    targets = select_linears(transformer, recipe)

    def convert(name: str, _module: nn.Module) -> nn.Module | None:
        return _empty_linear(targets[name], recipe) if name in targets else None

    return share_tree(transformer, convert)


def shared_quantized_skeleton(
    config: Mapping[str, Any], recipe: QuantRecipe, dtype: torch.dtype = torch.bfloat16
) -> WanTransformer3DModel:
    """As `quantized_skeleton` of `shared_meta_model`, and like that the same tree each time.

    Raises:
        WeightsError, ConversionError: as these.
    """
    kept = _skeletons(json.dumps(config, sort_keys=True), dtype)
    if recipe not in kept.quantized:
        kept.quantized[recipe] = quantized_skeleton(kept.plain, recipe)
    return kept.quantized[recipe]


def stored_state(module: nn.Module) -> dict[str, Tensor]:
    """The tensors of a tree that have still to be loaded, by name."""
    return {name: tensor for name, tensor in module.state_dict().items() if tensor.is_meta}


def check_stored(
    wanted: Mapping[str, Tensor],
    stored: Mapping[str, StoredTensor],
    *,
    source: str,
    exact: bool,
) -> None:
    """Hold what files have against what a tree wants.

    Args:
        source: what the files are, to be named in a refusal.
        exact: whether the dtypes have to be the wanted ones; otherwise any floating-point one may
            stand for another, but none of one byte, whose scales would be elsewhere.

    Raises:
        WeightsError: naming the first tensor that is missing, or has another shape or dtype.
    """
    for name, tensor in wanted.items():
        if name not in stored:
            count = sum(each not in stored for each in wanted)
            raise WeightsError(
                f"{source} lacks tensor {name!r}, and {count - 1} others: it is not whole, or was "
                "made for another transformer"
            )
        found = stored[name]
        if found.shape != tuple(tensor.shape):
            raise WeightsError(
                f"tensor {name!r} in {found.file} has shape {list(found.shape)}, not "
                f"{list(tensor.shape)} as the transformer's configuration says"
            )
        floats = found.dtype.is_floating_point and tensor.is_floating_point()
        convertible = floats and found.dtype.itemsize > 1
        if found.dtype is not tensor.dtype and (exact or not convertible):
            raise WeightsError(
                f"tensor {name!r} in {found.file} holds {found.dtype}, not {tensor.dtype}: give "
                "the model as its authors publish it, or make the checkpoint again"
            )


def load_weights(
    module: M,
    stored: Mapping[str, StoredTensor],
    reader: Reader,
    names: Collection[str] | None = None,
) -> M:
    """Give a tree on the meta device its weights, straight to where `reader` leads.

    What is real already stays as it is and where it is. Call `check_stored` first.

    Args:
        names: read these only.

    Raises:
        WeightsError: a file cannot be read, or has become shorter.
    """
    reader.read(allocate(module, stored, reader.device, names))
    return module


def move_buffers(module: M, device: torch.device) -> M:
    """Move what is computed rather than stored, in place; what has still to be loaded stays meta.

    `Module.to` does the same where everything is there, and looks at every tensor for it.
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
    """Make room for a tree's weights, one by one in the order of the files, for `Reader.read`.

    Of each file the small ones come first: they can be read together, and large ones that lie one
    behind the other in the file then do so in memory. When the last was taken, the tree holds them.
    A parameter that it has under several names is made once and stays one.
    """
    wanted = module.state_dict(keep_vars=True)
    empty = {
        name: tensor
        for name, tensor in wanted.items()
        if tensor.is_meta and name in stored and (names is None or name in names)
    }
    _reserve({id(tensor): tensor for tensor in empty.values()}.values(), device)
    made: dict[int, Tensor] = {}

    def place(name: str) -> tuple[Path, bool, int]:
        each = stored[name]
        return each.file, each.nbytes >= SMALL_BYTES, each.start

    for name in sorted(empty, key=place):
        tensor = empty[name]
        if id(tensor) not in made:
            real = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
            if isinstance(tensor, nn.Parameter):
                real = nn.Parameter(real, requires_grad=tensor.requires_grad)
            made[id(tensor)] = real
            yield stored[name], real
    for each in module.modules():
        for own in (each._parameters, each._buffers):
            for name, held in own.items():
                if id(held) in made:
                    own[name] = made[id(held)]  # type: ignore[assignment]


def _reserve(wanted: Iterable[Tensor], device: torch.device) -> None:
    """Have torch ask a device once for the memory of many tensors, which it then makes of it.

    Asking takes some tenths of a millisecond for each large one, and holds up copies meanwhile.
    """
    if device.type != "cpu":
        rounded = (-(-tensor.nbytes // _BLOCK_BYTES) * _BLOCK_BYTES for tensor in wanted)
        torch.empty(sum(rounded), dtype=torch.uint8, device=device)


def _empty_linear(linear: nn.Linear, recipe: QuantRecipe) -> Hif8Linear:
    rows = (linear.out_features, 1) if isinstance(recipe.weight_granularity, PerChannel) else ()
    per_token = isinstance(recipe.act_granularity, PerToken)
    return Hif8Linear(
        torch.empty(linear.weight.shape, dtype=torch.uint8, device="meta"),
        torch.empty(rows, dtype=torch.float32, device="meta"),
        act_scale=None if per_token else torch.empty((), dtype=torch.float32, device="meta"),
        act_policy=recipe.act_policy,
        bias=linear.bias,
    )
