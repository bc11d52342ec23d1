"""Test sets of protected blocks on held-out points: named sets beside random ones of equal size."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from quant.studies.output.page import Page
from quant.studies.output.plots import INK, SERIES, SOFT, drawing
from quant.studies.output.study_folder import Json, StudyFolder
from quant.studies.output.table import Column, Table
from quant.studies.points import Point, PointsFolder
from quant.studies.progress import StudyProgress
from quant.studies.protection.analyze import Subject, chosen_points
from quant.studies.protection.block_sets import middle_set, paper_sets, random_sets
from quant.studies.protection.interaction import (
    Protection,
    change_of,
    interactions,
    is_of_attention,
    with_attention,
)
from quant.studies.protection.sensitivity import energies
from quant.studies.protection.variants import BlockQuantizer
from quant.studies.statistics import estimate, holm, paired_difference, percentile_of

PAPER, AUTO = "both ends", "auto"


def named_protections(blocks: int, proposed: Sequence[int]) -> dict[str, Protection]:
    """Return the paper's four configurations, the proposal, and what they are compared with."""
    paper = paper_sets(blocks)
    ends = paper[PAPER]
    found = {name: Protection(each) for name, each in paper.items()}
    found[AUTO] = Protection(tuple(proposed))
    found["middle"] = Protection(middle_set(blocks, len(ends)))
    for block in ends:
        found[f"both ends without {block}"] = Protection(tuple(b for b in ends if b != block))
    found["both ends, and ffn.net.2"] = Protection(ends, "ffn.net.2")
    found["ffn.net.2 only"] = Protection((), "ffn.net.2")
    return found


def all_protections(
    blocks: int, proposed: Sequence[int], sets: int, seed: int
) -> dict[str, Protection]:
    """Return all that is measured.

    These are the named protections, some of them once more with attention in 8 bits, `sets` random
    ones of as many blocks as the paper's, and, if the proposal has another size, as many of that,
    or all that there are.

    Raises:
        StudyError: there are fewer than `sets` of the paper's size.
    """
    named = named_protections(blocks, proposed)
    ends = named[PAPER].blocks
    taken = [each.blocks for each in named.values() if not each.kept]
    drawn = random_sets(blocks, len(ends), sets, seed, taken)
    if len(proposed) != len(ends):
        known = len({each for each in taken if len(each) == len(proposed)})
        count = min(sets, math.comb(blocks, len(proposed)) - known)
        drawn += random_sets(blocks, len(proposed), count, seed, taken)
    attention = with_attention({name: named[name] for name in ("none", PAPER, AUTO, "middle")})
    chance = {f"random {number}": Protection(each) for number, each in enumerate(drawn)}
    return named | attention | chance


def that_differ(protections: Mapping[str, Protection], subject: Subject) -> dict[str, Protection]:
    """Leave out the sets that keep linears which the recipe keeps anyway: others are the same."""
    quantized = [name for names in subject.linears.values() for name in names]
    return {
        name: each
        for name, each in protections.items()
        if not each.kept or any(linear.endswith(each.kept) for linear in quantized)
    }


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Points of prompts that chose nothing, so many of each.

    Attributes:
        batch: how many points run together, at most, but all of a prompt at least.
    """

    points: PointsFolder
    per_prompt: int
    batch: int = 1

    @property
    def count(self) -> int:
        """How many points are used."""
        return len(chosen_points(self.points, self.per_prompt))

    def of_prompt(self, prompt: int) -> list[Point]:
        """Return the points of one prompt that are used."""
        every = list(self.points.of_prompt(prompt))
        chosen = chosen_points(self.points, self.per_prompt)
        return [every[number] for of, number in chosen if of == prompt]

    @property
    def batches(self) -> list[range]:
        """Return the prompts whose points run together, batch by batch."""
        prompts = len(self.points.info.prompts)
        each = max(1, self.batch * prompts // self.count)
        return [range(first, min(first + each, prompts)) for first in range(0, prompts, each)]


def measure_protections(
    subject: Subject,
    held_out: HeldOut,
    quantizer: BlockQuantizer,
    protections: Mapping[str, Protection],
    folder: StudyFolder,
    progress: StudyProgress,
) -> None:
    """Keep the error energies of every protection, a unit for each prompt.

    Samples that run together may differ in their last bits from those that run alone, so a batch
    of which an interrupted run kept a part runs again as a whole.
    """
    prompts = len(held_out.points.info.prompts)
    for batch in held_out.batches:
        points = [held_out.of_prompt(prompt) for prompt in batch]
        picked = [point for each in points for point in each]
        cost = subject.exact.blocks * len(picked)
        missing = [prompt for prompt in batch if folder.unit(f"prompt/{prompt}") is None]
        if not missing:
            progress.skip(cost * (1 + len(protections)))
            continue
        progress.describe(f"prompt {batch[-1] + 1} of {prompts}")
        reference = subject.exact.velocity(picked)
        progress.advance(cost)
        found = {}
        for name, protection in protections.items():
            change = change_of(subject, quantizer, protection)
            found[name] = energies(subject.exact.velocity(picked, change), reference)
            progress.advance(cost)
        values = {name: iter(each) for name, each in found.items()}
        for prompt, own in zip(batch, points, strict=True):
            value = {name: [next(each) for _ in own] for name, each in values.items()}
            if prompt in missing:
                folder.keep(f"prompt/{prompt}", value)


def report(
    folder: StudyFolder,
    prompts: Sequence[str],
    protections: Mapping[str, Protection],
    recipe: str,
) -> tuple[Json, dict[str, Table], dict[str, bytes], Page]:
    """Build everything that `StudyFolder.finish` writes.

    Args:
        recipe: in words, for the page.
    """
    units = [folder.unit(f"prompt/{number}") for number in range(len(prompts))]
    owners = [text for text, unit in zip(prompts, units, strict=True) for _ in unit[PAPER]]  # type: ignore[index]
    energy = {name: [each for unit in units for each in unit[name]] for name in protections}  # type: ignore[index]
    estimates = {name: estimate(values, owners) for name, values in energy.items()}
    chance = [name for name in protections if name.startswith("random ")]
    named = [name for name in protections if name not in chance and not is_of_attention(name)]
    drawn = _by_size({protections[name].blocks: estimates[name].mean for name in chance})
    others = [name for name in named if name != PAPER]
    differences = {name: paired_difference(energy[name], energy[PAPER], owners) for name in others}
    adjusted = holm({name: each.permutation_p for name, each in differences.items()})
    unprotected = estimates["none"].mean
    attention, table = interactions(energy, owners)
    results: Json = {
        "sets": {
            name: {
                **asdict(estimates[name]),
                "blocks": list(protections[name].blocks),
                "kept": protections[name].kept,
                "gain_db": float(10 * np.log10(unprotected / estimates[name].mean)),
                **_beside_random(protections[name], estimates[name].mean, drawn),
            }
            for name in (*named, *chance)
        },
        "attention": attention,
        "against_paper": {
            name: {**asdict(each), "holm_p": adjusted[name], "real": each.is_real}
            for name, each in differences.items()
        },
        "random_sets": len(drawn.get(len(protections[PAPER].blocks), ())),
        "prompts": len(prompts),
        "points": len(owners),
    }
    tables = {"named": _named_table(results, named), "random": _random_table(results, named)}
    if table is not None:
        tables["attention"] = table
    of_paper = drawn.get(len(protections[PAPER].blocks), ())
    figures = {"sets": _figure(results, named, of_paper)}
    return results, tables, figures, _page(results, tables, figures, named, recipe)


def _by_size(means: Mapping[tuple[int, ...], float]) -> dict[int, list[float]]:
    """Group the errors of random sets by their number of blocks."""
    found: dict[int, list[float]] = {}
    for blocks, mean in means.items():
        found.setdefault(len(blocks), []).append(mean)
    return found


def _beside_random(
    protection: Protection, mean: float, drawn: Mapping[int, Sequence[float]]
) -> Json:
    """Rank a set among random ones that keep as much of the model in BF16; others say nothing."""
    same = [] if protection.kept else drawn.get(len(protection.blocks), [])
    return {
        "percentile": 100 - percentile_of(mean, same) if same else None,
        "random_sets": len(same),
        "worse_random_sets": sum(each > mean for each in same),
    }


def _beaten(found: Json) -> str | None:
    """Say how many random sets of as many blocks are worse; None if none were drawn."""
    total = found["random_sets"]
    return f"{found['worse_random_sets']} of {total}" if total else None


def _named_table(results: Json, named: Sequence[str]) -> Table:
    columns = (
        Column("protected"),
        Column("blocks"),
        Column("error energy, %", 4),
        Column("95 % from", 4),
        Column("to", 4),
        Column("gain over none, dB", 2),
        Column("better than random sets of its size"),
        Column("minus both ends, %", 4),
        Column("from", 4),
        Column("to ", 4),
        Column("p (Holm)", 4),
        Column("detectable, %", 4),
    )
    rows = []
    for name in named:
        each, other = results["sets"][name], results["against_paper"].get(name)
        rows.append(
            (
                name,
                ", ".join(map(str, each["blocks"])) or "none",
                100 * each["mean"],
                100 * each["low"],
                100 * each["high"],
                each["gain_db"],
                _beaten(each),
                *(
                    (None,) * 5
                    if other is None
                    else (
                        100 * other["mean"],
                        100 * other["low"],
                        100 * other["high"],
                        other["holm_p"],
                        100 * other["detectable"],
                    )
                ),
            )
        )
    return Table(columns, rows, frozenset({list(named).index(PAPER)}))


def _random_table(results: Json, named: Sequence[str]) -> Table:
    columns = (Column("set"), Column("blocks"), Column("error energy, %", 4))
    drawn = [name for name in results["sets"] if name not in named]
    drawn.sort(key=lambda name: _order(results["sets"][name]))
    rows = []
    for name in drawn:
        each = results["sets"][name]
        rows.append((name, ", ".join(map(str, each["blocks"])), 100 * each["mean"]))
    return Table(columns, rows)


def _order(found: Json) -> tuple[int, float]:
    return len(found["blocks"]), float(found["mean"])


def _figure(results: Json, named: Sequence[str], drawn: Sequence[float]) -> bytes:
    with drawing(7.0, 0.32 * len(named) + 1.2) as figure:
        axes: Any = figure.axes
        places = np.arange(len(named))[::-1]
        if drawn:
            low, middle, high = 100 * np.percentile(drawn, (5, 50, 95))
            axes.axvspan(low, high, color="#eef0f3", lw=0, zorder=0)
            axes.axvline(middle, color=SOFT, lw=0.8, ls=":")
        for place, name in zip(places, named, strict=True):
            each = results["sets"][name]
            color = SERIES[1] if name == AUTO else SERIES[0]
            axes.plot((100 * each["low"], 100 * each["high"]), (place, place), color=INK, lw=0.8)
            axes.plot(100 * each["mean"], place, "o", color=color, ms=5)
        axes.set_yticks(places, named)
        axes.set(xlabel="error energy of the velocity, %")
        axes.grid(visible=False, axis="y")
    return figure.png


def _page(
    results: Json,
    tables: Mapping[str, Table],
    figures: Mapping[str, bytes],
    named: Sequence[str],
    recipe: str,
) -> Page:
    paper, auto = results["sets"][PAPER], results["sets"][AUTO]
    page = Page(
        "What protecting blocks is worth",
        f"{results['points']} held-out points of {results['prompts']} prompts, recipe {recipe}. "
        "Teacher-forced, error of the velocity against float32. Intervals and tests are "
        "over prompts.",
    )
    for whose, found in (("The paper's", paper), ("The proposed", auto)):
        if (count := _beaten(found)) is not None:
            page.finding(
                f"{whose} blocks are better than {count} random sets of {len(found['blocks'])}."
            )
    difference = results["against_paper"][AUTO]
    page.finding(
        f"The proposed set leaves {100 * auto['mean']:.3f} % error, the paper's "
        f"{100 * paper['mean']:.3f} %: a difference of {100 * difference['mean']:+.3f} % "
        f"[{100 * difference['low']:.3f}, {100 * difference['high']:.3f}], "
        + ("which is real." if difference["real"] else "which these prompts do not show.")
    )
    page.figure(
        figures["sets"],
        "Mean error with 95 % intervals. Shaded: the middle 90 % of random sets of as many blocks "
        "as both ends.",
    )
    page.table(tables["named"])
    real = [name for name in named if results["against_paper"].get(name, {}).get("real")]
    page.text(f"Different from both ends by their intervals: {', '.join(real) or 'none'}.")
    if "attention" in tables:
        page.heading("With self-attention in 8 bits")
        page.text(
            "Queries, keys and values are rounded to HiFloat8 in the blocks that are not "
            "protected: alone, and together with their linears."
        )
        page.table(tables["attention"])
    page.heading("Random sets")
    page.table(tables["random"])
    return page
