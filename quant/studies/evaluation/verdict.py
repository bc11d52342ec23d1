"""Compare candidates by every judge, and say in words no more than the intervals do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from quant.studies.evaluation.candidates import BF16
from quant.studies.evaluation.measures import Measure
from quant.studies.statistics import Difference, holm, paired_difference

ALPHA = 0.05
DIVERGED_PSNR_DB, DIVERGED_LPIPS = 20.0, 0.55
"""A video this far from that of BF16 shows something else: its trajectory went another way."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two candidates by one judge: `first` − `second`, of the same prompts and seeds.

    Attributes:
        holm_p: p of the permutation test, adjusted for all comparisons of the evaluation.
    """

    measure: Measure
    first: str
    second: str
    difference: Difference
    holm_p: float
    equal: bool

    @property
    def is_shown(self) -> bool:
        """Whether the interval leaves out 0 and the adjusted test agrees."""
        return self.difference.is_real and self.holm_p < ALPHA

    def words(self) -> str:
        """Return the verdict as a sentence."""
        by, unit = self.measure.name, f" {self.measure.unit}".rstrip()
        found = self.difference
        span = f"[{_signed(found.low)}, {_signed(found.high)}]{unit}"
        if self.equal:
            return f"By {by}, {self.first} and {self.second} are equal in every sample."
        if self.is_shown:
            is_better = (found.mean > 0) == self.measure.higher_is_better
            return (
                f"By {by}, {self.first} is {'better' if is_better else 'worse'} than "
                f"{self.second} on average: {_signed(found.mean)}{unit}, 95 % interval {span}, "
                f"p {self.holm_p:.2g} after Holm."
            )
        reason = (
            f", although the interval leaves out 0 (p {self.holm_p:.2g} after Holm)"
            if found.is_real
            else ""
        )
        return (
            f"By {by}, {found.prompts} prompts do not tell {self.first} from {self.second}{reason}:"
            f" the difference lies in {span}. This is no proof that they are equal; a single "
            f"test would have seen one of {found.detectable:.3g}{unit} with a probability of 80 %."
        )


def compare(measures: Sequence[Measure]) -> list[Comparison]:
    """Compare each two candidates that a judge has judged; BF16 is always the second.

    Raises:
        StudyError: there are fewer than two prompts.
    """
    found: list[tuple[Measure, str, str, Difference]] = []
    for measure in measures:
        names = [name for name in measure.values if name != BF16]
        pairs = [(name, BF16) for name in names] if BF16 in measure.values else []
        for first, second in [*pairs, *combinations(names, 2)]:
            difference = paired_difference(
                measure.values[first], measure.values[second], measure.prompts
            )
            found.append((measure, first, second, difference))
    adjusted = holm({str(number): each[3].permutation_p for number, each in enumerate(found)})
    return [
        Comparison(*each, adjusted[str(number)], _equal(*each[:3]))
        for number, each in enumerate(found)
    ]


def diverged(measures: Sequence[Measure]) -> dict[str, list[int]]:
    """Return the numbers of each candidate's videos that show something else than BF16's."""
    found: dict[str, set[int]] = {}
    for measure in measures:
        for name, values in measure.values.items() if measure.needs == "pair" else ():
            far = found.setdefault(name, set())
            far |= {place for place, value in enumerate(values) if _is_far(measure.name, value)}
    return {name: sorted(far) for name, far in found.items()}


def divergence_words(found: Mapping[str, Sequence[int]], videos: int) -> list[str]:
    """Say which candidates have diverged videos."""
    return [
        f"{len(far)} of {videos} videos of {name} went another way than BF16's (PSNR below "
        f"{DIVERGED_PSNR_DB:g} dB or ST-LPIPS above {DIVERGED_LPIPS:g}): their distances say that "
        "they differ, not that they are worse. Read the medians."
        for name, far in found.items()
        if far
    ]


def _is_far(judge: str, value: float) -> bool:
    return (judge == "psnr" and value < DIVERGED_PSNR_DB) or (
        judge == "st-lpips" and value > DIVERGED_LPIPS
    )


def _equal(measure: Measure, first: str, second: str) -> bool:
    return list(measure.values[first]) == list(measure.values[second])


def _signed(value: float) -> str:
    return f"{value:+.3g}".replace("-", "−") if value else "0"
