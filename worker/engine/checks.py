"""A stage whose result is no numbers has failed, and ends the job instead of becoming a video."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from jobs.errors import GenerationFailed


def require_finite(values: Tensor, whose: str, remedy: str) -> None:
    """Raise GenerationFailed if any of `values` is NaN or infinite; waits for the device."""
    wrong = values.numel() - int(values.isfinite().sum())
    if wrong:
        raise GenerationFailed(
            f"{whose} gave {wrong} of {values.numel()} values that are NaN or infinite, of which "
            f"no video can be made. {remedy}"
        )


@contextmanager
def checked(modules: Iterable[nn.Module], check: Callable[[], None]) -> Iterator[None]:
    """Call `check` before each of `modules` runs; what it raises ends the forward pass there."""
    handles = [module.register_forward_pre_hook(lambda *_: check()) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
