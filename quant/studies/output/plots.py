"""Draw the figures of studies in one style: PNGs for paper and screen."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

INK, SOFT = "#1c2330", "#8a93a1"
SERIES = ("#2f6fde", "#d9822b", "#3a9d68", "#a855b5", "#c23b4b", "#5b6472")
"""Colours of series, told apart by people who see red and green alike."""
PROTECTED = "#dce8ff"

_STYLE = {
    "figure.dpi": 150,
    "savefig.bbox": "tight",
    "font.size": 9,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e7eaee",
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
}


class Drawing:
    """A figure while it is drawn; `png` is there when the block of `drawing` has ended.

    Attributes:
        axes: matplotlib's axes.
    """

    def __init__(self, figure: Any, axes: Any) -> None:
        self.figure = figure
        self.axes = axes
        self.png = b""

    def whole_numbers(self) -> None:
        """Put ticks of the x axis, such as blocks or steps, at whole numbers only."""
        self.axes.xaxis.get_major_locator().set_params(integer=True)

    def label_logarithm(self, axis: Any) -> None:
        """Give a logarithmic axis plain labels that do not run into each other."""
        from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter  # noqa: PLC0415

        low, high = axis.get_view_interval()
        if high < 5 * low:
            axis.set_major_locator(MaxNLocator(5))
        else:
            axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 200 * low else (1,)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())

    def mark_blocks(self, blocks: Sequence[int]) -> None:
        """Shade the protected blocks on an x axis of block numbers."""
        for block in blocks:
            self.axes.axvspan(block - 0.5, block + 0.5, color=PROTECTED, lw=0, zorder=0)


@contextmanager
def drawing(width_in: float = 7.0, height_in: float = 3.2) -> Iterator[Drawing]:
    """Yield axes to draw on; afterwards the drawing has its PNG."""
    # Takes a second to import, and only studies draw.
    import matplotlib as mpl  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(width_in, height_in))
        made = Drawing(figure, figure.subplots())
        yield made
        data = io.BytesIO()
        # Without the version of the library, equal results give equal bytes.
        figure.savefig(data, format="png", metadata={"Software": None})
        made.png = data.getvalue()
