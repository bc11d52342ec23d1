"""Copy a module tree without copying tensors.

The copy's modules are new, its parameters and buffers are the very tensors of the first tree. Both
trees can run, in turn, on one device for the price of one model plus what a caller replaced.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TypeVar

from torch import nn

from quant.errors import ConversionError

M = TypeVar("M", bound=nn.Module)
Convert = Callable[[str, nn.Module], nn.Module | None]

_REGISTRIES = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")


def share_tree(root: M, convert: Convert) -> M:
    """Copy a module tree without copying tensors: modules are new, parameters and buffers shared.

    Args:
        convert: given a module's full name and the module, its replacement, or None to copy it.

    Raises:
        ConversionError: a module carries hooks or a patched forward, which a copy would lose.
    """
    twin = _share("", root, convert, {})
    assert isinstance(twin, type(root)), "the root of a tree is never converted"
    return twin


def _share(
    name: str, module: nn.Module, convert: Convert, copies: dict[int, nn.Module]
) -> nn.Module:
    # Not a closure: one that calls itself lives on in a cycle, and with it every module it saw.
    if id(module) not in copies:
        twin = copies[id(module)] = convert(name, module) or _shallow_copy(name, module)
        for child_name, child in twin._modules.items():
            if child is not None:
                full_name = f"{name}.{child_name}".lstrip(".")
                twin._modules[child_name] = _share(full_name, child, convert, copies)
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
