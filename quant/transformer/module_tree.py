"""Copy a module tree without copying its tensors.

The copy has modules of its own. Its parameters and buffers are the same tensor objects as in the
source tree. Both trees can run in turn on one device, and need the memory of one model plus the
modules that the caller replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import TypeVar

import torch
from torch import nn

from quant.errors import ConversionError

M = TypeVar("M", bound=nn.Module)
Convert = Callable[[str, nn.Module], nn.Module | None]

_REGISTRIES = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")


def share_tree(root: M, convert: Convert) -> M:
    """Make a shared copy of a module tree: new modules, the same parameters and buffers.

    Args:
        convert: called with a module's full name and the module. Returns the module's replacement,
            or None to copy the module.

    Raises:
        ConversionError: a module carries hooks or a patched forward, which a copy would lose.
    """
    copy = _share("", root, convert, {})
    assert isinstance(copy, type(root)), "the root of a tree is never converted"
    return copy


def share_except(root: M, names: Iterable[str]) -> M:
    """Make a shared copy of a module tree in which some parameters are new, on the meta device.

    Args:
        names: of the parameters that the copy does not share.

    Raises:
        ConversionError: as for `share_tree`.
    """
    copy = share_tree(root, lambda _name, _module: None)
    for name in names:
        module, _, own = name.rpartition(".")
        parameters = copy.get_submodule(module)._parameters
        shared = parameters[own]
        assert shared is not None, f"{name} is a parameter of the tree"
        empty = torch.empty_like(shared, device="meta")
        parameters[own] = nn.Parameter(empty, requires_grad=shared.requires_grad)
    return copy


def _share(
    name: str, module: nn.Module, convert: Convert, copies: dict[int, nn.Module]
) -> nn.Module:
    # Not a closure: a closure that calls itself is a reference cycle, which would keep every module
    # it visited alive until the garbage collector runs.
    if id(module) not in copies:
        copy = copies[id(module)] = convert(name, module) or _shallow_copy(name, module)
        for child_name, child in copy._modules.items():
            if child is not None:
                full_name = f"{name}.{child_name}".lstrip(".")
                copy._modules[child_name] = _share(full_name, child, convert, copies)
    return copies[id(module)]


def _shallow_copy(name: str, module: nn.Module) -> nn.Module:
    state = module.__dict__
    registries, hooks = _containers(tuple(state))
    hooked = [key for key in hooks if state[key]]
    if hooked or "forward" in state:
        raise ConversionError(
            f"module {name or 'root'!r} carries {', '.join(hooked) or 'a patched forward'}: "
            "quantize first, then attach hooks, offloading or compilation"
        )
    copy = module.__class__.__new__(module.__class__)
    # nn.Module's own containers are copied one level deep. The tensors in them stay shared, but a
    # tensor or hook that is later replaced in one tree is not replaced in the other. The attribute
    # with diffusers' own hooks is left out. It is empty here: a hook would have patched forward.
    attributes = state.copy()
    attributes.pop("_diffusers_hook", None)
    for key in registries:
        attributes[key] = attributes[key].copy()
    for key in hooks:  # all empty
        attributes[key] = type(attributes[key])()
    copy.__dict__ = attributes
    return copy


@lru_cache
def _containers(keys: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the names of attributes that hold tensors or modules, and of those that hold hooks."""
    hooks = tuple(key for key in keys if "_hooks" in key)
    return tuple(key for key in keys if key in _REGISTRIES), hooks
