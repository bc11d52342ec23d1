"""Build the quantized twin of a transformer, sharing every tensor that stays as it is.

The twin is a second module tree: its modules are new and its `Hif8Linear`s are its own, but norms,
embeddings, biases and protected blocks are the very tensors of the first tree. Both can run, in
turn, on one card for the price of one model plus the 8-bit weights.

What is converted is checked against the recipe, linear by linear: a pattern that matches nothing,
a block with another number of linears or a transformer with another number of blocks is an error,
never a smaller conversion.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import TypeVar

from torch import Tensor, nn

from quant.errors import ConversionError
from quant.granularity import PerToken
from quant.linear import Hif8Linear
from quant.metrics import sqnr_db
from quant.recipe import QuantRecipe
from quant.report import ConversionReport, ConvertedLinear, weight_bytes
from quant.scales import Scales

M = TypeVar("M", bound=nn.Module)
Convert = Callable[[str, nn.Module], nn.Module | None]

_REGISTRIES = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")


def quantize_transformer(
    transformer: M, recipe: QuantRecipe, scales: Scales
) -> tuple[M, ConversionReport]:
    """Build a quantized twin that shares every tensor it does not quantize with `transformer`.

    Call `quant.check_scales` first: here the scales are only looked up by name. The first tree is
    left as it was.

    Raises:
        ConversionError: the recipe does not fit, a scale is missing, or the tree carries hooks.
    """
    targets = select_linears(transformer, recipe)
    require_scales(targets, recipe, scales)
    rows: list[ConvertedLinear] = []

    def convert(name: str, module: nn.Module) -> nn.Module | None:
        if name not in targets:
            return None
        quantized = Hif8Linear.from_linear(
            targets[name],
            scales.weight_scale[name],
            act_scale=scales.act_scale.get(name),
            act_policy=recipe.act_policy,
        )
        rows.append(_row(name, targets[name], quantized))
        return quantized

    twin = twin_tree(transformer, convert)
    report = ConversionReport(
        rows=tuple(rows),
        blocks=len(recipe.quantized_blocks),
        total_blocks=recipe.total_blocks,
        weight_bytes=weight_bytes(twin),
        source_weight_bytes=weight_bytes(transformer),
    )
    return twin, report


def select_linears(transformer: nn.Module, recipe: QuantRecipe) -> dict[str, nn.Linear]:
    """The linears a recipe quantizes, by full name, in the order of the blocks.

    Raises:
        ConversionError: the block count, a pattern or the number of linears is not the recipe's.
    """
    blocks = _blocks(transformer)
    if len(blocks) != recipe.total_blocks:
        raise ConversionError(
            f"recipe {recipe.name!r} is for a transformer of {recipe.total_blocks} blocks "
            f"(it protects {list(recipe.protected_blocks)}), this one has {len(blocks)}: "
            "write a recipe with total_blocks and protected_blocks for it"
        )
    found: dict[str, nn.Linear] = {}
    for index in recipe.quantized_blocks:
        found |= _select_in_block(index, blocks[index], recipe)
    for pattern in recipe.kept_linears:
        if not any(fnmatchcase(name, pattern) for name in found):
            raise ConversionError(
                f"kept_linears pattern {pattern!r} of recipe {recipe.name!r} matches none of the "
                f"{len(found)} linears it would quantize: patterns are full names such as "
                f"{next(iter(found), 'blocks.0.ffn.net.2')!r}"
            )
    return {name: linear for name, linear in found.items() if not recipe.keeps(name)}


def require_scales(targets: Iterable[str], recipe: QuantRecipe, scales: Scales) -> None:
    """Make sure that there are scales for every linear a recipe quantizes.

    Raises:
        ConversionError: naming the first linear that has none.
    """
    names = list(targets)
    known = set(scales.weight_scale)
    if not isinstance(recipe.act_granularity, PerToken):
        known &= set(scales.act_scale)
    missing = [name for name in names if name not in known]
    if missing:
        raise ConversionError(
            f"the scales have none for {len(missing)} of {len(names)} linears, "
            f"the first being {missing[0]}: calibrate again with recipe {recipe.name!r}"
        )


def twin_tree(root: M, convert: Convert) -> M:
    """Copy a module tree without copying tensors: modules are new, parameters and buffers shared.

    Args:
        convert: given a module's full name and the module, its replacement, or None to copy it.

    Raises:
        ConversionError: a module carries hooks or a patched forward, which a copy would lose.
    """
    twin = _twin_of("", root, convert, {})
    assert isinstance(twin, type(root)), "the root of a tree is never converted"
    return twin


def _twin_of(
    name: str, module: nn.Module, convert: Convert, copies: dict[int, nn.Module]
) -> nn.Module:
    # Not a closure: one that calls itself lives on in a cycle, and with it every module it saw.
    if id(module) not in copies:
        twin = copies[id(module)] = convert(name, module) or _shallow_copy(name, module)
        for child_name, child in twin._modules.items():
            if child is not None:
                full_name = f"{name}.{child_name}".lstrip(".")
                twin._modules[child_name] = _twin_of(full_name, child, convert, copies)
    return copies[id(module)]


def _shallow_copy(name: str, module: nn.Module) -> nn.Module:
    state = module.__dict__
    registries, hooks = _own_containers(tuple(state))
    hooked = [key for key in hooks if state[key]]
    if hooked or "forward" in state:
        raise ConversionError(
            f"module {name or 'root'!r} carries {', '.join(hooked) or 'a patched forward'}: "
            "quantize first, then attach hooks, offloading or compilation"
        )
    twin = module.__class__.__new__(module.__class__)
    # nn.Module's own containers are copied one level deep: the tensors in them stay shared, but
    # what is later swapped or hooked in one tree stays out of the other. So does diffusers' list of
    # its own hooks, which is empty here or there would be a patched forward.
    own = state.copy()
    own.pop("_diffusers_hook", None)
    for key in registries:
        own[key] = own[key].copy()
    for key in hooks:  # all empty
        own[key] = type(own[key])()
    twin.__dict__ = own
    return twin


@lru_cache
def _own_containers(keys: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Of a module's attributes those that hold tensors and modules, and those that hold hooks."""
    hooks = tuple(key for key in keys if "_hooks" in key)
    return tuple(key for key in keys if key in _REGISTRIES), hooks


def _blocks(transformer: nn.Module) -> nn.ModuleList:
    blocks = getattr(transformer, "blocks", None)
    if not isinstance(blocks, nn.ModuleList):
        raise ConversionError(
            f"{type(transformer).__name__} has no ModuleList `blocks`: recipes address the blocks "
            "of a WanTransformer3DModel"
        )
    return blocks


def _select_in_block(index: int, block: nn.Module, recipe: QuantRecipe) -> dict[str, nn.Linear]:
    linears = {name: m for name, m in block.named_modules() if isinstance(m, nn.Linear)}
    matched: dict[str, nn.Linear] = {}
    for pattern in recipe.linears:
        hits = {name: m for name, m in linears.items() if fnmatchcase(name, pattern)}
        if not hits:
            raise ConversionError(
                f"pattern {pattern!r} of recipe {recipe.name!r} matches no linear in block "
                f"{index}, which has {', '.join(linears) or 'none'}"
            )
        matched |= hits
    if len(matched) != recipe.linears_per_block:
        raise ConversionError(
            f"recipe {recipe.name!r} implies {recipe.linears_per_block} linears per block, its "
            f"patterns match {len(matched)} in block {index}: {', '.join(matched)}"
        )
    return {f"blocks.{index}.{name}": linear for name, linear in matched.items()}


def _row(name: str, linear: nn.Linear, quantized: Hif8Linear) -> ConvertedLinear:
    _, block, kind = name.split(".", 2)
    weight: Tensor = linear.weight.detach()
    return ConvertedLinear(
        block=int(block),
        kind=kind,
        out_features=linear.out_features,
        in_features=linear.in_features,
        weight_scale=quantized.weight_scale.max().item(),
        act_scale=None if quantized.act_scale is None else quantized.act_scale.item(),
        weight_sqnr_db=sqnr_db(weight, quantized.dequantized_weight(weight.dtype)),
    )
