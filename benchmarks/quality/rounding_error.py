"""Draw the error of rounding by magnitude: `python -m benchmarks.quality.rounding_error`.

It writes the picture that docs/numerics.md shows. A value x of a tensor whose largest magnitude is
1 is rounded under the scale that the format's own policy takes from that. A point of a curve is the
root mean square of (rounded - x) / x over the octave around a magnitude. 100 % means that the value
is lost: it has become zero, or is far beyond the largest value. Nothing is drawn at random.
"""

import io
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from PIL import Image

from benchmarks.report import ROOT
from quant.numerics.scaling import choose_scale
from quant.studies.methods.formats import BF16, E4M3, E5M2, HIF8, INT8, Format
from quant.studies.output.plots import INK, SERIES, SOFT, drawing

FORMATS: tuple[Format, ...] = (HIF8, E4M3, E5M2, INT8, BF16)
LOWEST, HIGHEST, PER_OCTAVE = -36, 14, 8
VALUES = 4096  # in an octave

Values = NDArray[np.float64]


def relative_error(number_format: Format, magnitudes: Values) -> Values:
    """Return the RMS relative error of a format in the octave around each magnitude: [N] → [N].

    Args:
        magnitudes: as shares of the tensor's largest one, for which the scale is chosen.
    """
    spread = 2 ** ((np.arange(VALUES) + 0.5) / VALUES - 0.5)
    x = torch.from_numpy(np.outer(magnitudes, spread)).float()
    scale = choose_scale(number_format.policy, torch.tensor(1.0))
    error = number_format.fake_quantize(x, scale).double() / x.double() - 1
    return error.square().mean(1).sqrt().numpy()


def picture() -> bytes:
    """Draw the curves of all formats: a PNG."""
    magnitudes = 2.0 ** np.arange(LOWEST, HIGHEST + 1 / PER_OCTAVE, 1 / PER_OCTAVE)
    # The name of each curve, where no other curve runs.
    labels = {
        "HiF8": (-14.5, 12.5),
        "E4M3": (-17.4, 50),
        "E5M2": (-29, 3.2),
        "INT8": (-5.2, 0.7),
        "BF16": (-29, 0.2),
    }
    with drawing(7.0, 3.3) as figure:
        axes: Any = figure.axes
        axes.axvline(1, color=SOFT, lw=1, ls=(0, (2, 2)))
        axes.text(1.3, 0.085, "largest value seen", color=INK, fontsize=8)
        axes.text(2.0**3.2, 60, "E4M3, E5M2, INT8", color=INK, fontsize=8)
        for number_format, colour in zip(FORMATS, SERIES, strict=False):
            bold = 2.4 if number_format is HIF8 else 1.4
            error = 100 * relative_error(number_format, magnitudes)
            axes.plot(magnitudes, error, color=colour, lw=bold, label=number_format.name)
            power, height = labels[number_format.name]
            axes.text(2.0**power, height, number_format.name, color=colour, weight="bold")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g} %")
        axes.set_xticks([2.0**power for power in range(LOWEST, HIGHEST + 1, 4)])
        axes.set(
            xlim=(2.0**LOWEST, 2.0**HIGHEST),
            ylim=(0.07, 150),
            xlabel="magnitude, as a share of the largest value seen",
            ylabel="relative error (RMS)",
        )
    small = io.BytesIO()
    Image.open(io.BytesIO(figure.png)).convert("RGB").quantize(64).save(small, "png", optimize=True)
    return small.getvalue()


def main(
    out: Annotated[Path, typer.Option(help="The PNG to write.")] = ROOT
    / "docs/figures/rounding-error.png",
) -> None:
    """Draw the relative error of HiF8, E4M3, E5M2, INT8 and BF16 by magnitude."""
    data = picture()
    out.parent.mkdir(exist_ok=True)
    out.write_bytes(data)
    typer.echo(f"{out}: {len(data) / 1000:.0f} kB")


if __name__ == "__main__":
    typer.run(main)
