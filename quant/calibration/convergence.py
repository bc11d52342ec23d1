"""Say how many prompts a calibration needs: when its scales have stopped changing.

A scale follows the largest magnitude so far, so that another prompt either changes it, for good, or
does nothing. A scale is called settled after a prompt if the last `WINDOW` prompts, that one
included, have not changed it. With prompts in no particular order, the last of n prompts holds the
largest magnitude of all with a chance of 1 / n, and a scale in powers of two changes less often
still. So scales that are settled may change later on, and ever fewer of them do.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from quant.errors import CalibrationError
from quant.numerics.granularity import PerToken
from quant.numerics.scaling import choose_scale
from quant.recipe.recipe import QuantRecipe
from quant.tables import align

WINDOW = 8
"""As many prompts as a calibration needs at least: a smaller number settles scales by chance."""


@dataclass(frozen=True, slots=True)
class Convergence:
    """How the M scales of a recipe have changed over P prompts.

    Attributes:
        history: the scales after each prompt, [P, M] float32.
    """

    history: Tensor

    @classmethod
    def of(cls, recipe: QuantRecipe, amax: Tensor) -> Convergence:
        """Follow the scales of activations, and of FP8 attention, from amax [M, G, P].

        Raises:
            CalibrationError: the scales do not follow from amax alone, or there are none.
        """
        check_convergence(recipe)
        running = amax.float().amax(1).cummax(1).values.T if amax.numel() else amax.new_zeros(0, 0)
        return cls(choose_scale(recipe.act_policy, running))

    @property
    def settled(self) -> tuple[float, ...]:
        """Return the share of scales that are settled after each prompt; 0 in the first WINDOW."""
        same = (self.history[WINDOW:] == self.history[:-WINDOW]).double().mean(1)
        return (0.0,) * min(WINDOW, len(self.history)) + tuple(same.tolist())

    @property
    def final(self) -> tuple[float, ...]:
        """Return the share of scales that are those after the last prompt, after each prompt."""
        return tuple((self.history == self.history[-1:]).double().mean(1).tolist())

    def is_reached(self, share: float) -> bool:
        """Return whether at least `share` of the scales are settled after the last prompt."""
        return len(self.history) > WINDOW and self.settled[-1] >= share

    def table(self) -> str:
        """Return a table with a row for 1, 2, 4, 8 and each further 8 prompts, and the last."""
        count = len(self.history)
        shown = sorted({*(n for n in (1, 2, 4) if n <= count), *range(8, count + 1, 8), count})
        rows: list[tuple[str, ...]] = [("prompts", "final scales", f"settled over {WINDOW}")]
        for n in shown:
            settled = f"{self.settled[n - 1]:.1%}" if n > WINDOW else "-"
            rows.append((str(n), f"{self.final[n - 1]:.1%}", settled))
        return align(rows)


def check_convergence(recipe: QuantRecipe) -> None:
    """Refuse a recipe whose scales cannot be followed prompt by prompt.

    Raises:
        CalibrationError: it says why.
    """
    if isinstance(recipe.act_granularity, PerToken):
        raise CalibrationError(
            f"recipe {recipe.name!r} scales each token while it runs, so no number of prompts "
            "changes its scales: leave out --until"
        )
    if recipe.act_policy.needs_binades:
        raise CalibrationError(
            f"recipe {recipe.name!r} chooses scales by {recipe.act_policy.name!r}, from a "
            "histogram over all prompts together, so it is not known what each has changed: leave "
            "out --until, or use a policy that takes the largest magnitude, such as 'pow2'"
        )


def parse_share(text: str | None) -> float | None:
    """Read a share such as 99% or 0.99.

    Raises:
        CalibrationError: it is not a number, or not above 0 and up to 1.
    """
    if text is None:
        return None
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise CalibrationError(
            f"until {text!r} must be a share of the scales above 0% and up to 100%, like 99%"
        )
    return share
