"""Turn what an analysis measured into results, tables, figures and a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from quant.errors import StudyError
from quant.studies.output.page import Page
from quant.studies.output.plots import INK, SERIES, drawing
from quant.studies.output.study_folder import Json, StudyFolder
from quant.studies.output.table import Column, Table
from quant.studies.protection.activations import Activation, share_beyond_band
from quant.studies.protection.analyze import Subject, sensitivity_unit
from quant.studies.protection.block_sets import greedy_set, paper_sets
from quant.studies.protection.variants import BlockQuantizer
from quant.studies.statistics import Estimate, estimate, rank_correlation

_AMAX, _KURTOSIS = (Activation.names().index(name) for name in ("amax", "kurtosis"))


class Analysis:
    """What an analysis measured, read from its folder's units."""

    def __init__(self, subject: Subject, folder: StudyFolder, prompts: Sequence[str]) -> None:
        self.subject = subject
        self.prompts = prompts
        self.blocks = subject.exact.blocks
        numbers = range(len(prompts))
        self._activations = [_unit(folder, f"activations/{number}") for number in numbers]
        self._sensitivity = [self._single(folder, number) for number in numbers]
        self._sets = {number: folder.unit(f"sets/{number}") for number in numbers}

    def _single(self, folder: StudyFolder, prompt: int) -> Json:
        """Gather what the sweeps of a prompt have measured of single blocks and linears."""
        found: Json = {"blocks": {}, "linears": {}}
        variants = (self.subject.single_blocks(), self.subject.single_linears())
        for kind, each in zip(("blocks", "linears"), variants, strict=True):
            units = [folder.unit(sensitivity_unit(prompt, variant.key)) for variant in each]
            for unit in filter(None, units):
                found[kind] |= unit["energy"]
                found.setdefault("points", unit["points"])
        if len(found["blocks"]) != self.blocks:
            raise StudyError("the analysis is not complete: run the same command again")
        return found

    def block_energy(self) -> dict[int, Estimate]:
        """Return the error energy of each block quantized alone, as a share of the velocity's."""
        found = {}
        for block in range(self.blocks):
            values, owners = self._collected("blocks", str(block))
            found[block] = estimate(values, owners)
        return found

    def linear_energy(self) -> dict[str, Estimate]:
        """Return the error energy of each linear quantized alone, where it was measured."""
        names = [name for block in self.subject.linears for name in self.subject.full_names(block)]
        found = {}
        for name in names:
            values, owners = self._collected("linears", name)
            if len(set(owners)) > 1:
                found[name] = estimate(values, owners)
        return found

    def stream(self, value: int) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Return a statistic of the stream after each block: [prompts, blocks], the largest."""
        rows = [
            np.max([[each[value] for each in point["stream"]] for point in unit["points"]], 0)
            for unit in self._activations
        ]
        return np.array(rows)

    def update(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Return how much each block changes the stream: [prompts, blocks], the mean."""
        return np.array(
            [np.mean([p["update"] for p in unit["points"]], 0) for unit in self._activations]
        )

    def inputs(self, name: str) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Return the statistics of a linear's input: [points, values of `Activation`]."""
        return np.array(
            [point["linears"][name] for unit in self._activations for point in unit["points"]]
        )

    def binades(self, name: str) -> list[float]:
        """Return the histogram of a linear's input over all points."""
        total: list[float] = np.sum(
            [unit["binades"][name] for unit in self._activations], 0
        ).tolist()
        return total

    def additivity(self) -> dict[str, tuple[list[float], list[float]]]:
        """Return (predicted, measured) energies at each checked point, by set."""
        found: dict[str, tuple[list[float], list[float]]] = {}
        for prompt, unit in self._sets.items():
            if unit is None:
                continue
            single = self._sensitivity[prompt]
            place = single["points"].index(unit["point"])
            for name, protected in unit["protected"].items():
                left = [block for block in range(self.blocks) if block not in protected]
                predicted = sum(single["blocks"][str(block)][place] for block in left)
                pair = found.setdefault(name, ([], []))
                pair[0].append(predicted)
                pair[1].append(unit["measured"][name])
        return found

    def _collected(self, kind: str, key: str) -> tuple[list[float], list[str]]:
        values: list[float] = []
        owners: list[str] = []
        for text, unit in zip(self.prompts, self._sensitivity, strict=True):
            each = unit.get(kind, {}).get(key, [])
            values += each
            owners += [text] * len(each)
        return values, owners


def _unit(folder: StudyFolder, name: str) -> Json:
    found = folder.unit(name)
    if found is None:
        raise StudyError("the analysis is not complete: run the same command again")
    unit: Json = found
    return unit


def report(
    analysis: Analysis, quantizer: BlockQuantizer, budget: Mapping[str, Any]
) -> tuple[Json, dict[str, Table], dict[str, bytes], Page]:
    """Build everything that `StudyFolder.finish` writes."""
    energy, linears = analysis.block_energy(), analysis.linear_energy()
    means = {block: each.mean for block, each in energy.items()}
    proposed = greedy_set(means, **budget)
    paper = paper_sets(analysis.blocks)["both ends"]
    total = sum(means.values())
    proxies = _proxies(analysis, means)
    additivity = {
        name: {"predicted": float(np.mean(a)), "measured": float(np.mean(b)), "points": len(a)}
        for name, (a, b) in analysis.additivity().items()
    }
    removed = {
        "proposed": sum(means[block] for block in proposed) / total,
        "paper": sum(means[block] for block in paper) / total,
    }
    results: Json = {
        "measured_recipe": analysis.subject.recipe.fingerprint,
        "blocks": {str(block): asdict(each) for block, each in energy.items()},
        "linears": {name: asdict(each) for name, each in linears.items()},
        "total_energy": total,
        "proposed": list(proposed),
        "budget": dict(budget),
        "paper_set": list(paper),
        "energy_removed": removed,
        "proxies": proxies,
        "additivity": additivity,
        "prompts": len(analysis.prompts),
    }
    tables = {
        "blocks": _blocks_table(analysis, energy, proposed),
        "linears": _linears_table(analysis, quantizer, linears),
        "additivity": _additivity_table(additivity),
    }
    figures = {
        "activations": _activations_figure(analysis, paper),
        "sensitivity": _sensitivity_figure(energy, proposed, paper),
        "update": _update_figure(analysis, means),
    }
    return results, tables, figures, _page(analysis, results, tables, figures)


def _proxies(analysis: Analysis, means: Mapping[int, float]) -> Json:
    """Rank what one pass shows against the error energies (Spearman)."""
    energy = [means[block] for block in range(analysis.blocks)]
    candidates = {
        "largest magnitude of the stream": analysis.stream(_AMAX).max(0),
        "kurtosis of the stream": analysis.stream(_KURTOSIS).mean(0),
        "update share": analysis.update().mean(0),
    }
    found = {}
    for name, values in candidates.items():
        correlation, p = rank_correlation(values.tolist(), energy)
        found[name] = {"spearman": correlation, "p": p}
    return found


def _blocks_table(
    analysis: Analysis, energy: Mapping[int, Estimate], proposed: Sequence[int]
) -> Table:
    columns = (
        Column("block"),
        Column("error energy, %", 5),
        Column("95 % from", 5),
        Column("to", 5),
        Column("largest magnitude", 1),
        Column("its spread over prompts (sd)", 1),
        Column("kurtosis", 1),
        Column("outlier channels", 1),
        Column("update share", 3),
    )
    amax, kurtosis, update = analysis.stream(_AMAX), analysis.stream(_KURTOSIS), analysis.update()
    outliers = analysis.stream(Activation.names().index("outlier_channels"))
    rows = [
        (
            block,
            100 * each.mean,
            100 * each.low,
            100 * each.high,
            float(amax[:, block].max()),
            float(amax[:, block].std()),
            float(kurtosis[:, block].mean()),
            float(outliers[:, block].mean()),
            float(update[:, block].mean()),
        )
        for block, each in energy.items()
    ]
    return Table(columns, rows, frozenset(proposed))


def _linears_table(
    analysis: Analysis, quantizer: BlockQuantizer, linears: Mapping[str, Estimate]
) -> Table:
    columns = (
        Column("linear"),
        Column("error energy, %", 6),
        Column("largest input", 2),
        Column("99.9th percentile", 3),
        Column("kurtosis", 1),
        Column("outlier channels", 1),
        Column("beyond the 3-bit band, %", 2),
    )
    p999, outliers = (Activation.names().index(name) for name in ("p999", "outlier_channels"))
    rows = []
    for block in analysis.subject.linears:
        for name in analysis.subject.full_names(block):
            inputs, found = analysis.inputs(name), linears.get(name)
            beyond = share_beyond_band(analysis.binades(name), float(quantizer.act_scale[name]))
            rows.append(
                (
                    name,
                    None if found is None else 100 * found.mean,
                    float(inputs[:, _AMAX].max()),
                    float(inputs[:, p999].mean()),
                    float(inputs[:, _KURTOSIS].mean()),
                    float(inputs[:, outliers].mean()),
                    100 * beyond,
                )
            )
    return Table(columns, rows)


def _additivity_table(additivity: Mapping[str, Json]) -> Table:
    columns = (
        Column("protected"),
        Column("sum of single energies, %", 5),
        Column("measured together, %", 5),
        Column("ratio", 3),
        Column("points"),
    )
    rows = [
        (
            name,
            100 * each["predicted"],
            100 * each["measured"],
            each["measured"] / each["predicted"] if each["predicted"] else None,
            each["points"],
        )
        for name, each in additivity.items()
    ]
    return Table(columns, rows)


def _activations_figure(analysis: Analysis, paper: Sequence[int]) -> bytes:
    amax = analysis.stream(_AMAX)
    blocks = np.arange(analysis.blocks)
    with drawing() as figure:
        figure.mark_blocks(paper)
        axes = figure.axes
        low, middle, high = np.percentile(amax, (5, 50, 95), axis=0)
        axes.fill_between(blocks, low, high, color=SERIES[0], alpha=0.25, lw=0)
        axes.plot(
            blocks, middle, color=SERIES[0], marker="o", ms=2.5, lw=1.2, label="median prompt"
        )
        axes.plot(blocks, amax.max(0), color=INK, lw=0.8, ls=":", label="largest of all prompts")
        axes.set(
            xlabel="block", ylabel="largest magnitude of the stream", xlim=(-0.6, len(blocks) - 0.4)
        )
        axes.legend(loc="best")
        figure.whole_numbers()
    return figure.png


def _sensitivity_figure(
    energy: Mapping[int, Estimate], proposed: Sequence[int], paper: Sequence[int]
) -> bytes:
    blocks = list(energy)
    means = np.array([100 * each.mean for each in energy.values()])
    low = np.array([100 * each.low for each in energy.values()])
    high = np.array([100 * each.high for each in energy.values()])
    colors = [SERIES[1] if block in proposed else SERIES[0] for block in blocks]
    with drawing() as figure:
        figure.mark_blocks(paper)
        axes = figure.axes
        axes.bar(blocks, means, color=colors, width=0.75)
        axes.errorbar(
            blocks, means, (means - low, high - means), fmt="none", ecolor=INK, elinewidth=0.7
        )
        axes.set(
            xlabel="block quantized alone", ylabel="error energy, %", xlim=(-0.6, len(blocks) - 0.4)
        )
        figure.whole_numbers()
    return figure.png


def _update_figure(analysis: Analysis, means: Mapping[int, float]) -> bytes:
    update = analysis.update().mean(0)
    with drawing(4.5, 3.4) as figure:
        axes = figure.axes
        # A logarithm has no place for a block of which the recipe keeps every linear.
        shown = [block for block in range(analysis.blocks) if means[block] > 0]
        energy = [100 * means[block] for block in shown]
        axes.scatter(update[shown], energy, s=14, color=SERIES[0])
        for block, each in zip(shown, energy, strict=True):
            axes.annotate(str(block), (update[block], each), fontsize=6, color=INK)
        axes.set(
            xlabel="update share of the block", ylabel="error energy, %", xscale="log", yscale="log"
        )
        for axis in (axes.xaxis, axes.yaxis):
            figure.label_logarithm(axis)
    return figure.png


def _page(
    analysis: Analysis, results: Json, tables: Mapping[str, Table], figures: Mapping[str, bytes]
) -> Page:
    proposed, paper = results["proposed"], results["paper_set"]
    removed = results["energy_removed"]
    page = Page(
        "Which blocks suffer from quantization",
        f"{len(analysis.prompts)} prompts, {analysis.blocks} blocks, recipe "
        f"{analysis.subject.recipe_words}. Errors are of the velocity, teacher-forced, against "
        "float32; intervals are over prompts.",
    )
    page.finding(
        f"Protecting blocks {_listed(proposed)} removes {removed['proposed']:.0%} of the error "
        f"energy; the paper's {_listed(paper)} remove {removed['paper']:.0%}."
    )
    proxies = results["proxies"]
    best = max(proxies, key=lambda name: abs(proxies[name]["spearman"]))
    order = "with" if proxies[best]["spearman"] > 0 else "against"
    ranks = ", ".join(
        f"{name} {each['spearman']:.2f} (p {each['p']:.2g})" for name, each in proxies.items()
    )
    page.finding(
        f"Of what one pass shows, the {best} goes {order} the error most closely. Spearman's rank "
        f"correlations: {ranks}."
    )
    page.heading("Error energy of each block, quantized alone")
    page.figure(
        figures["sensitivity"],
        "Mean over prompts with 95 % intervals. Orange: the proposed blocks. Shaded: the paper's.",
    )
    page.table(tables["blocks"])
    page.heading("Do energies add?")
    page.text(
        "If the energies of single blocks add up to that of a set, the set of the largest ones is "
        "the best of its size."
    )
    page.table(tables["additivity"])
    page.heading("Activations")
    page.figure(
        figures["activations"],
        "Largest magnitude of the residual stream after each block: the median prompt, the middle "
        "90 % of prompts, and the largest of all. Shaded: the paper's blocks.",
    )
    page.figure(figures["update"], "How much a block changes the stream, and its error energy.")
    page.heading("Linears")
    page.table(tables["linears"])
    return page


def _listed(blocks: Sequence[int]) -> str:
    return ", ".join(map(str, blocks)) or "none"
