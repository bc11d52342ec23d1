"""Run the arithmetic of tensors on `npu` on their memory, which in the stand-in is the host's.

Every operator but views, allocations, copies and waits is caught by a dispatch mode: aten operators
run as the CPU's, `npu::` operators by `references`. Allocations, copies between host and device and
waits go through torch_npu and the stand-in, so that these can fail as on a card.

The mode also counts operators, keeps their shapes, and says which of them torch_npu has no kernel
for (a card runs those on the CPU) and which see float64 (a card has none).
"""

from __future__ import annotations

import ctypes
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from tests.npu.stand_in import control
from tests.npu.stand_in.references import REFERENCES

# Allocations, and what changes no value. The stand-in and torch_npu do them.
_REAL = {
    "aten::empty",
    "aten::empty_strided",
    "aten::detach",
    "aten::_unsafe_view",
    "aten::set_",
    "aten::resize_",
    "aten::_pin_memory",
    "aten::is_pinned",
    "aten::record_stream",
    "aten::_local_scalar_dense",
}
_COPIES = {"aten::copy_", "aten::_to_copy"}
_EXPLICIT = ("CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional")


class SimulatedCard(TorchDispatchMode):
    """The mode, and what it has seen; every thread enters the same one."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()
        self.shapes: defaultdict[str, set[object]] = defaultdict(set)
        self.fallbacks: Counter[str] = Counter()
        self.float64: Counter[str] = Counter()
        self._until_loss: int | None = None
        self._lock = threading.Lock()

    def lose_after(self, ops: int) -> None:
        """Lose the card after a number of operators from now."""
        self._until_loss = ops

    def forget(self) -> None:
        """Start counting anew."""
        for each in (self.ops, self.shapes, self.fallbacks, self.float64):
            each.clear()

    def report(self) -> dict[str, dict[str, int]]:
        """Return by operator: how often it ran, with how many shapes, and what a card has not."""
        return {
            "ops": dict(self.ops),
            "shapes": {name: len(found) for name, found in self.shapes.items()},
            "fallbacks": dict(self.fallbacks),
            "float64": dict(self.float64),
        }

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = _tensors(args) if not kwargs else _tensors((*args, *kwargs.values()))
        if FakeTensor in types or FakeTensor in map(type, tensors):
            return func(*args, **kwargs)  # only shapes are computed
        kind = _kind_of(func)
        wanted = kwargs.get("device")
        to_card = wanted is not None and torch.device(wanted).type == "npu"
        on_card = any(_is_on_card(each) for each in tensors)
        if kind.is_real or not (on_card or to_card):
            return func(*args, **kwargs)
        self._count(kind, tensors)
        if kind.name in _COPIES and (done := _copied(kind.name, args, kwargs)) is not None:
            return done
        return _on_host(kind, args, kwargs, to_card or (on_card and wanted is None))

    def _count(self, kind: _Kind, tensors: list[Tensor]) -> None:
        key = tuple([(each.dtype, each.shape) for each in tensors])
        with self._lock:
            self.ops[kind.name] += 1
            self.shapes[kind.name].add(key)
            if not kind.has_kernel:
                self.fallbacks[kind.name] += 1
            if any(each.dtype is torch.float64 and _is_on_card(each) for each in tensors):
                self.float64[kind.name] += 1
            if self._until_loss is not None:
                self._until_loss -= 1
                if self._until_loss <= 0:
                    self._until_loss = None
                    control.lose()


@dataclass(frozen=True, slots=True)
class _Kind:
    """What is known of an operator.

    Attributes:
        is_real: whether torch_npu and the stand-in run it: views, allocations.
        has_kernel: whether torch_npu runs it, or composes it of others that it runs.
        run: what computes it on the CPU.
        written: names and positions of the arguments that it writes to.
    """

    name: str
    is_real: bool
    has_kernel: bool
    run: Callable[..., Any]
    is_mutable: bool
    written: tuple[tuple[str, int], ...]
    results: int


@cache
def _kind_of(func: Any) -> _Kind:
    schema, has = func._schema, torch._C._dispatch_has_kernel_for_dispatch_key
    written = tuple(
        (each.name, position)
        for position, each in enumerate(schema.arguments)
        if each.alias_info is not None and each.alias_info.is_write
    )
    run = REFERENCES.get(schema.name)
    if run is None and schema.name.startswith("npu::"):

        def run(*_args: Any, **_keywords: Any) -> Any:
            raise NotImplementedError(f"no reference for {func}: add one to references.py")

    return _Kind(
        name=schema.name,
        is_real=func.is_view or schema.name in _REAL,
        has_kernel=any(has(func.name(), key) for key in ("PrivateUse1", *_EXPLICIT)),
        run=run or func,
        is_mutable=schema.is_mutable,
        written=written,
        results=len(schema.returns),
    )


def _tensors(values: Any) -> list[Tensor]:
    """Return the tensors among an operator's arguments, which may be lists of them."""
    found: list[Tensor] = []
    for each in values:
        if isinstance(each, Tensor):
            found.append(each)
        elif isinstance(each, list | tuple):
            found.extend(inner for inner in each if isinstance(inner, Tensor))
    return found


def _is_on_card(tensor: Tensor) -> bool:
    return tensor.device.type == "npu"


def on_host(tensor: Tensor) -> Tensor:
    """Return a tensor on the CPU that shares a card tensor's memory."""
    storage = tensor.untyped_storage()
    if storage.nbytes() == 0 or tensor.numel() == 0:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    memory = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    whole = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
    view = (tensor.storage_offset(), tensor.size(), tensor.stride())
    return torch.empty(0, dtype=tensor.dtype).set_(whole, *view)


def _to_card(tensor: Any) -> Any:
    if not isinstance(tensor, Tensor) or tensor.device.type != "cpu":
        return tensor
    found = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="npu")
    if tensor.numel():
        on_host(found).copy_(tensor)
    return found


def _copied(name: str, args: Any, kwargs: Any) -> Tensor | None:
    """Copy between host and card through torch_npu; None if nothing crosses."""
    if name == "aten::copy_":
        to, source = args[0], args[1]
        if _is_on_card(to) == _is_on_card(source):
            return None
        if _is_plain(to) and _is_plain(source) and to.dtype is source.dtype:
            return _real_copy(to, source, *args[2:])
        to.copy_(_real_copy(torch.empty_like(source, device=to.device), source))
        return to
    source, device = args[0], kwargs.get("device")
    if device is None or torch.device(device).type == source.device.type:
        return None
    layout = kwargs.get("memory_format")
    keywords = {} if layout is None else {"memory_format": layout}
    dense = source.to(kwargs.get("dtype") or source.dtype).contiguous()
    pin = bool(kwargs.get("pin_memory"))
    made = torch.empty(dense.shape, dtype=dense.dtype, device=device, pin_memory=pin)
    found = _real_copy(made, dense, bool(kwargs.get("non_blocking")))
    return found.contiguous(**keywords) if keywords else found


def _real_copy(to: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    return to.copy_(source, non_blocking)


def _is_plain(tensor: Tensor) -> bool:
    return tensor.is_contiguous()


def _host(value: Any) -> Any:
    if isinstance(value, Tensor):
        return on_host(value) if _is_on_card(value) else value
    if isinstance(value, list | tuple):
        return type(value)(map(_host, value)) if type(value) in (list, tuple) else value
    return value


def _on_host(kind: _Kind, args: Any, kwargs: Any, to_card: bool) -> Any:
    given = [_host(each) for each in args]
    keywords = {name: _host(each) for name, each in kwargs.items()}
    if keywords.get("device") is not None:
        keywords["device"] = torch.device("cpu")
    keywords.pop("pin_memory", None)
    result = kind.run(*given, **keywords)
    if kind.is_mutable:
        return _written(kind, args, kwargs)
    if not to_card:
        return result
    return _to_card(result) if isinstance(result, Tensor) else tree_map(_to_card, result)


def _written(kind: _Kind, args: Any, kwargs: Any) -> Any:
    """Return the arguments that an operator in place has written to, as it returns them."""
    written = [
        args[position] if position < len(args) else kwargs.get(name)
        for name, position in kind.written
    ]
    if kind.results == 0:
        return None
    return written[0] if kind.results == 1 else tuple(written)


active: SimulatedCard | None = None
"""The card of this process, if it runs on a simulated one."""


@contextmanager
def simulated() -> Iterator[SimulatedCard]:
    """Enter the mode in this thread and in every thread that starts meanwhile."""
    global active  # noqa: PLW0603 — one process has one card
    card = active = SimulatedCard()
    run = threading.Thread.run

    def in_mode(thread: threading.Thread) -> None:
        with card:
            run(thread)

    threading.Thread.run = in_mode  # type: ignore[method-assign, assignment]
    try:
        with card:
            yield card
    finally:
        threading.Thread.run = run  # type: ignore[method-assign]
