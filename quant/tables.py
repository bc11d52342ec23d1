"""Format tables as aligned columns of text."""

from __future__ import annotations

from collections.abc import Iterable


def span(values: Iterable[float]) -> str:
    """Return the range of some scales, such as `0.0625 .. 2`; without any, `per token`."""
    found = sorted(set(values))
    if not found:
        return "per token"
    return f"{found[0]:.4g}" if len(found) == 1 else f"{found[0]:.4g} .. {found[-1]:.4g}"


def align(rows: list[tuple[str, ...]]) -> str:
    """Format rows as lines of columns, the first aligned left, the others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            word.ljust(width) if i == 0 else word.rjust(width)
            for i, (word, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
