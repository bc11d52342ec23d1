"""A stage whose result is no numbers has failed, and ends the job instead of becoming a video."""

from __future__ import annotations

from torch import Tensor

from jobs.errors import GenerationFailed


def require_finite(values: Tensor, whose: str, remedy: str) -> None:
    """Raise GenerationFailed if any of `values` is NaN or infinite; waits for the device."""
    wrong = values.numel() - int(values.isfinite().sum())
    if wrong:
        raise GenerationFailed(
            f"{whose} gave {wrong} of {values.numel()} values that are NaN or infinite, of which "
            f"no video can be made. {remedy}"
        )
