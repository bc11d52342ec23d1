"""Check a stage's result for NaN, also inside a module, and let a job stop between two modules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from jobs.errors import GenerationFailed


def require_finite(values: Tensor, source: str, remedy: str) -> None:
    """Raise GenerationFailed if any of `values` is NaN or infinite; waits for the device.

    Args:
        source: what computed the values; the subject of the message.
        remedy: one sentence that ends the message.
    """
    wrong = values.numel() - int(values.isfinite().sum())
    if wrong:
        raise GenerationFailed(
            f"{source} gave {wrong} of {values.numel()} values that are NaN or infinite, of which "
            f"no video can be made. {remedy}"
        )


@contextmanager
def check_before_each(modules: Iterable[nn.Module], check: Callable[[], None]) -> Iterator[None]:
    """Call `check` before each of `modules` runs; its exception ends the forward pass there."""
    handles = [module.register_forward_pre_hook(lambda *_: check()) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def check_output(module: nn.Module, source: str, remedy: str) -> Iterator[None]:
    """Have `require_finite` check each output of `module`, before its caller clamps or rounds it.

    Args:
        source, remedy: as for `require_finite`.
    """
    handle = module.register_forward_hook(
        lambda _module, _inputs, output: require_finite(output, source, remedy)
    )
    try:
        yield
    finally:
        handle.remove()
