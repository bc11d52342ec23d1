"""Say what a comparison of methods has found: results, tables, a figure and the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from quant.studies.methods.compare import Protections, measured
from quant.studies.methods.method import Method, input_reads, weight_bytes
from quant.studies.methods.registry import OURS
from quant.studies.output.page import Page
from quant.studies.output.plots import INK, SERIES, drawing
from quant.studies.output.study_folder import Json, StudyFolder
from quant.studies.output.table import Cell, Column, Table
from quant.studies.protection.analyze import Subject
from quant.studies.statistics import estimate, holm, paired_difference

NONE = "none"
_ALPHA = 0.05
_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Comparison:
    """A comparison whose units are all kept."""

    subject: Subject
    folder: StudyFolder
    prompts: Sequence[str]
    methods: Sequence[Method]
    protections: Protections

    def energy(self, method: Method, protection: str) -> list[float]:
        """Return the error energies at all points."""
        units = measured(self.folder, method, len(self.prompts), protection)
        return [each for unit in units for each in unit]

    def owners(self) -> list[str]:
        """Return the prompt of each point."""
        units = measured(self.folder, self.methods[0], len(self.prompts), NONE)
        return [text for text, unit in zip(self.prompts, units, strict=True) for _ in unit]


def report(found: Comparison) -> tuple[Json, dict[str, Table], dict[str, bytes], Page]:
    """Build everything that `StudyFolder.finish` writes."""
    owners = found.owners()
    results: Json = {
        "recipe": found.subject.recipe_words,
        "methods": {method.name: _method_results(found, method) for method in found.methods},
        "protections": {name: list(blocks) for name, blocks in found.protections.items()},
        "against_ours": _against_ours(found, owners),
        "against_none": _against_none(found, owners),
        "bf16_bytes": _bytes(found.subject, found.methods[0], tuple(found.subject.linears)),
        "prompts": len(found.prompts),
        "points": len(owners),
    }
    tables = {
        "errors": _error_table(results),
        "cost": _cost_table(results),
        "protection": _protection_table(results),
    }
    figures = {"methods": _figure(results)}
    return results, tables, figures, _page(results, tables, figures)


def _method_results(found: Comparison, method: Method) -> Json:
    errors = {}
    for protection, blocks in found.protections.items():
        energy = found.energy(method, protection)
        errors[protection] = {
            **asdict(estimate(energy, found.owners())),
            "bytes": _bytes(found.subject, method, blocks),
        }
    return {
        "summary": method.summary,
        "source": method.source,
        "weights": method.weight.label,
        "inputs": method.act.label,
        "reads": input_reads(method),
        "calibrated": method.is_calibrated,
        "calibration_s": _calibration_seconds(found, method),
        "errors": errors,
    }


def _bytes(subject: Subject, method: Method, protected: Sequence[int]) -> int:
    """Return the bytes of all linears that methods quantize; protected ones take two a weight."""
    total = 0
    for index, names in subject.linears.items():
        block = subject.exact.transformer.blocks[index]
        shapes = [tuple(block.get_submodule(name).weight.shape) for name in names]
        exact = sum(2 * rows * width for rows, width in shapes)
        total += exact if index in protected else weight_bytes(method, shapes)
    return total


def _calibration_seconds(found: Comparison, method: Method) -> float:
    """Return the seconds of measuring inputs, if the method needs it, and of its own rounding."""
    if not method.is_calibrated:
        return 0.0
    units: list[Any] = [
        found.folder.unit(f"calibration/{index}") for index in range(found.subject.exact.blocks)
    ]
    return sum(
        float(unit["measuring_s"]) + float(unit["rounding_s"].get(method.name, 0.0))
        for unit in units
    )


def _against_ours(found: Comparison, owners: Sequence[str]) -> Json:
    """Compare each method with ours under the same protection: differences of the error energy."""
    ours = next(method for method in found.methods if method.name == OURS)
    pairs = {
        (protection, method.name): (
            found.energy(method, protection),
            found.energy(ours, protection),
        )
        for protection in found.protections
        for method in found.methods
        if method is not ours
    }
    return _differences(pairs, owners)


def _against_none(found: Comparison, owners: Sequence[str]) -> Json:
    """Compare each protection with none under the same method."""
    pairs = {
        (protection, method.name): (found.energy(method, protection), found.energy(method, NONE))
        for protection in found.protections
        if protection != NONE
        for method in found.methods
    }
    return _differences(pairs, owners)


def _differences(
    pairs: Mapping[tuple[str, str], tuple[list[float], list[float]]], owners: Sequence[str]
) -> Json:
    """Return the paired differences by protection and method, with Holm's p over all of them."""
    differences = {key: paired_difference(a, b, owners) for key, (a, b) in pairs.items()}
    names = {"\n".join(key): key for key in pairs}
    adjusted = holm({name: differences[key].permutation_p for name, key in names.items()})
    found: Json = {}
    for name, (protection, method) in names.items():
        each = differences[protection, method]
        found.setdefault(protection, {})[method] = {
            **asdict(each),
            "holm_p": adjusted[name],
            "real": each.is_real and adjusted[name] < _ALPHA,
        }
    return found


def _error_table(results: Json) -> Table:
    columns = (
        Column("method"),
        Column("protected"),
        Column("error energy, %", significant=3),
        Column("95 % from", significant=3),
        Column("to", significant=3),
        Column("minus hif8, %", significant=3),
        Column("from", significant=3),
        Column("to ", significant=3),
        Column("p (Holm)", 4),
        Column("detectable, %", significant=3),
        Column("real"),
    )
    rows: list[Sequence[Cell]] = []
    for protection in results["protections"]:
        for name, method in results["methods"].items():
            error = method["errors"][protection]
            other = results["against_ours"].get(protection, {}).get(name)
            rows.append(
                (
                    name,
                    protection,
                    *(100 * error[key] for key in ("mean", "low", "high")),
                    *_difference_cells(other),
                )
            )
    marked = frozenset(number for number, row in enumerate(rows) if row[0] == OURS)
    return Table(columns, rows, marked)


def _difference_cells(other: Json | None) -> tuple[Cell, ...]:
    if other is None:
        return (None,) * 6
    return (
        *(100 * other[key] for key in ("mean", "low", "high")),
        other["holm_p"],
        100 * other["detectable"],
        "yes" if other["real"] else "no",
    )


def _cost_table(results: Json) -> Table:
    columns = (
        Column("method"),
        Column("weights"),
        Column("inputs"),
        Column("MiB of weights", 2),
        Column("of BF16, %", 1),
        Column("reads of an input"),
        Column("calibration, s", 1),
    )
    rows = []
    for name, method in results["methods"].items():
        size = method["errors"][NONE]["bytes"]
        rows.append(
            (
                name,
                method["weights"],
                method["inputs"],
                size / _MIB,
                100 * size / results["bf16_bytes"],
                method["reads"],
                method["calibration_s"],
            )
        )
    return Table(columns, rows)


def _protection_table(results: Json) -> Table:
    columns = (
        Column("method"),
        Column("protected"),
        Column("gain over none, dB", 2),
        Column("minus none, %", significant=3),
        Column("from", significant=3),
        Column("to", significant=3),
        Column("p (Holm)", 4),
        Column("detectable, %", significant=3),
        Column("real"),
    )
    rows: list[Sequence[Cell]] = []
    for protection, others in results["against_none"].items():
        for name, other in others.items():
            errors = results["methods"][name]["errors"]
            rows.append((name, protection, _gain_db(errors, protection), *_difference_cells(other)))
    return Table(columns, rows)


def _gain_db(errors: Json, protection: str) -> float | None:
    before, after = errors[NONE]["mean"], errors[protection]["mean"]
    return float(10 * np.log10(before / after)) if before > 0 and after > 0 else None


def _figure(results: Json) -> bytes:
    names = list(results["methods"])
    protections = list(results["protections"])
    with drawing(7.0, 0.3 * len(names) + 1.2) as figure:
        axes: Any = figure.axes
        places = np.arange(len(names))[::-1]
        for number, protection in enumerate(protections):
            shift = 0.22 * (0.5 * (len(protections) - 1) - number)
            errors = [results["methods"][name]["errors"][protection] for name in names]
            for place, each in zip(places + shift, errors, strict=True):
                axes.plot((100 * each["low"], 100 * each["high"]), (place, place), color=INK, lw=1)
            means = [100 * each["mean"] for each in errors]
            axes.plot(means, places + shift, "o", color=SERIES[number], ms=4.5, label=protection)
        axes.set_xscale("log")
        axes.set_yticks(places, names)
        axes.set(xlabel="error energy of the velocity, % (logarithmic)")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(protections))
    return figure.png


def _page(results: Json, tables: Mapping[str, Table], figures: Mapping[str, bytes]) -> Page:
    page = Page(
        "Ways to quantize, compared",
        f"{results['points']} held-out points of {results['prompts']} prompts, the linears of "
        f"recipe {results['recipe']}. Teacher-forced, error of the velocity against float32. Only "
        "rounding is seen: products and sums are in float32. Intervals and tests are over prompts, "
        "paired; p by Holm over each whole table.",
    )
    for sentence in findings(results):
        page.finding(sentence)
    page.figure(
        figures["methods"],
        "Mean error of each method by the blocks that are protected, with 95 % intervals.",
    )
    page.heading("Errors, and differences from hif8 under the same protection")
    page.table(tables["errors"])
    page.heading("What protecting blocks is worth, by method")
    page.facts(
        {
            name: ", ".join(map(str, blocks)) or "no block"
            for name, blocks in results["protections"].items()
        }
    )
    page.table(tables["protection"])
    page.heading("What a method costs")
    page.text(
        "Weights of the quantized linears with their scales, no block protected. An input is read "
        "once to be rounded, and once more where its scale, or its outliers, are found at run "
        "time. Seconds of calibration are of this run and machine: measuring, which the methods "
        "share, and a method's own rounding."
    )
    page.table(tables["cost"])
    page.heading("The methods")
    page.facts(
        {
            name: f"{method['summary']} ({method['source']})"
            for name, method in results["methods"].items()
        }
    )
    return page


def findings(results: Json) -> list[str]:
    """Say in plain words which differences are real."""
    found = []
    others = results["against_ours"].get(NONE, {})
    smaller = [name for name, each in others.items() if each["real"] and each["mean"] < 0]
    larger = [name for name, each in others.items() if each["real"] and each["mean"] > 0]
    unknown = [name for name in others if name not in {*smaller, *larger}]
    if others:
        found.append(
            f"Without protection, less error than {OURS}: {_listed(smaller)}. "
            f"More: {_listed(larger)}. Not told apart: {_listed(unknown)}."
        )
    for protection, methods in results["against_none"].items():
        helped = [name for name, each in methods.items() if each["real"] and each["mean"] < 0]
        worse = [name for name, each in methods.items() if each["real"] and each["mean"] > 0]
        sentence = f"Protecting blocks ({protection}) lowers the error of {_listed(helped)}."
        found.append(sentence + (f" It raises that of {_listed(worse)}." if worse else ""))
    count, tests = results["prompts"], sum(map(len, results["against_ours"].values()))
    if tests * 2.0 ** (1 - count) >= _ALPHA:
        found.append(
            f"{count} prompts are too few for {tests} tests: no difference of a table could be "
            "called real. Record more prompts, or name fewer methods."
        )
    return found


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"
