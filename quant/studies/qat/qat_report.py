"""Say what a study of QAT has found: tables, curves and the page, with a verdict in plain words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from quant.studies.output.page import Page
from quant.studies.output.plots import INK, SERIES, drawing
from quant.studies.output.study_folder import Json
from quant.studies.output.table import Cell, Column, Table
from quant.studies.qat.grid import CONTROL
from quant.studies.qat.outcomes import (
    BETTER,
    DIVERGED,
    FACTORS,
    UNSURE,
    WORSE,
    Outcome,
    best_cell,
    counted,
    outcome_of,
    too_few,
)

_NOUNS = {"velocity": "error energy of the velocity", "flow": "flow-matching loss"}
_UNITS = {"velocity": (100.0, "%"), "flow": (1.0, "")}
_WORDS = {
    "learning_rate": "learning rate",
    "step": "steps",
    "batch": "batch",
    "data": "data",
    "seed": "seed",
}
_LINES = ("-", "--", ":", "-.")
_MARKERS = "osv^Dx"


def report(found: Outcome) -> tuple[Json, dict[str, Table], dict[str, bytes], Page]:
    """Build everything that `StudyFolder.finish` writes."""
    results = found.results()
    results["findings"] = findings(results)
    tables: dict[str, Table] = {}
    figures: dict[str, bytes] = {}
    for measure in results["measures"]:
        tables[f"{measure}-cells"] = _cell_table(results, measure)
        tables[f"{measure}-controls"] = _control_table(results, measure)
        tables[f"{measure}-when"] = _when_table(results, measure)
        for method in results["methods"]:
            figures[f"{measure}-{method}"] = _curves(results, measure, method)
    return results, tables, figures, _page(results, tables, figures)


def findings(results: Json) -> list[str]:
    """Say in plain words where QAT beats PTQ, where it does not, and where it does harm."""
    found = []
    for measure in results["measures"]:
        found += [_verdict(results, measure, method) for method in results["methods"]]
        found.append(_control_sentence(results, measure))
        if too_few(results, measure):
            prompts = results["measures"][measure]["prompts"]
            found.append(
                f"{prompts} prompts are too few for {len(results['cells'])} trainings: no "
                "difference could be called real. Hold out more prompts, or train less."
            )
    return found


def _verdict(results: Json, measure: str, method: str) -> str:
    cells = [cell for cell in results["cells"] if cell["method"] == method]
    counts = counted(cells, measure)
    noun, before = _NOUNS[measure], results["ptq"][method][measure]["mean"]
    text = (
        f"{method}, {noun}: PTQ has {_shown(measure, before)}. Of {len(cells)} "
        f"training{'s' * (len(cells) != 1)} {counts[BETTER]} with less, {counts[WORSE]} with more, "
        f"{counts[UNSURE]} not told apart"
    )
    text += f", and {counts[DIVERGED]} diverged. " if counts[DIVERGED] else ". "
    best = best_cell(cells, measure)
    if best is None:
        return text + "QAT fails here."
    what = f"{_shown(measure, best[measure]['mean'])} ({_named(best)})"
    if outcome_of(best, measure) != BETTER:
        return text + f"No training is shown to beat PTQ; the least is {what}."
    text += f"The least is {what}"
    gain = best[measure]["gain_db"]
    text += f", a gain of {gain:.2f} dB. " if gain is not None else ". "
    return text + _share_of_training(results, measure, best)


def _share_of_training(results: Json, measure: str, best: Json) -> str:
    """Say whether the same training without the method, and PTQ after it, does as well."""
    control = _control_of(results, best)
    if control["diverged"]:
        return "The same training in BF16 diverged."
    alike = _shown(measure, control[measure][best["method"]]["mean"])
    outcome = outcome_of(best, measure, "control")
    ends = {
        BETTER: "so it is training through the rounding that helps",
        WORSE: "which is less: more training helps, and QAT does not",
        UNSURE: "which is not told apart: that QAT helps, and not training itself, is not shown",
    }
    return f"The same training in BF16, and PTQ after it, has {alike}, {ends[outcome]}."


def _control_sentence(results: Json, measure: str) -> str:
    last = results["steps"][-1]
    values = [
        control[measure][CONTROL]["mean"]
        for control in results["controls"]
        if control["step"] == last and not control["diverged"]
    ]
    before = _shown(measure, results["ptq"][CONTROL][measure]["mean"])
    if not values:
        return f"All trainings in BF16 diverged; before, BF16 has {before}."
    low, high = (_shown(measure, each) for each in (min(values), max(values)))
    after = low if low == high else f"between {low} and {high}"
    return (
        f"Training alone, in BF16 without quantization, takes the {_NOUNS[measure]} from {before} "
        f"to {after} after {last} steps."
    )


def _control_of(results: Json, cell: Json) -> Json:
    alike: Json = next(
        control
        for control in results["controls"]
        if all(control[factor] == cell[factor] for factor in FACTORS)
    )
    return alike


def _named(cell: Json) -> str:
    return (
        f"learning rate {cell['learning_rate']:g}, batch {cell['batch']}, data {cell['data']}, "
        f"{cell['step']} steps"
    )


def _shown(measure: str, value: float) -> str:
    factor, unit = _UNITS[measure]
    return f"{factor * value:.3g}{f' {unit}' if unit else ''}"


def _varied(results: Json) -> tuple[str, ...]:
    """Return the options that differ between trainings; the others are facts of the study."""
    return tuple(
        factor
        for factor in FACTORS
        if factor == "step" or len({cell[factor] for cell in results["cells"]}) > 1
    )


def _cell_table(results: Json, measure: str) -> Table:
    unit, varied = _UNITS[measure][1] or "loss", _varied(results)
    columns = (
        Column("method"),
        *(Column(_WORDS[factor]) for factor in varied),
        Column("training loss", significant=3),
        Column(unit, significant=4),
        Column("95 % from", significant=4),
        Column("to", significant=4),
        Column("gain over PTQ, dB", 2),
        Column("minus PTQ", significant=3),
        Column("p (Holm)", 4),
        Column("than PTQ"),
        Column("minus BF16 training, then PTQ", significant=3),
        Column("p (Holm) ", 4),
        Column("than that"),
    )
    rows: list[Sequence[Cell]] = []
    marked = set()
    for cell in results["cells"]:
        if outcome_of(cell, measure) == BETTER:
            marked.add(len(rows))
        rows.append(
            (
                cell["method"],
                *(cell[factor] for factor in varied),
                *_values(cell, measure),
            )
        )
    return Table(columns, rows, frozenset(marked))


def _values(cell: Json, measure: str) -> tuple[Cell, ...]:
    if cell["diverged"]:
        return (*(None,) * 7, DIVERGED, None, None, DIVERGED)
    factor = _UNITS[measure][0]
    each, found = cell[measure], list[Cell]()
    for name in ("ptq", "control"):
        other = each.get(f"against_{name}")
        if other is None:
            found += [None, None, "the control diverged"]
        else:
            found += [factor * other["mean"], other["holm_p"], other["outcome"]]
    return (
        cell["training_loss"],
        *(factor * each[key] for key in ("mean", "low", "high")),
        each["gain_db"],
        *found,
    )


def _control_table(results: Json, measure: str) -> Table:
    methods, varied = (CONTROL, *results["methods"]), _varied(results)
    unit = _UNITS[measure][1]
    columns = (
        *(Column(_WORDS[factor]) for factor in varied),
        *(Column(f"{method}{f', {unit}' if unit else ''}", significant=4) for method in methods),
    )
    factor = _UNITS[measure][0]
    first = (0 if name == "step" else None for name in varied)
    rows: list[Sequence[Cell]] = [
        (*first, *(factor * results["ptq"][method][measure]["mean"] for method in methods))
    ]
    for control in results["controls"]:
        values: Sequence[Cell] = (
            [None] * len(methods)
            if control["diverged"]
            else [factor * control[measure][method]["mean"] for method in methods]
        )
        rows.append((*(control[name] for name in varied), *values))
    return Table(columns, rows, frozenset({0}))


def _when_table(results: Json, measure: str) -> Table:
    """Count outcomes by each value of each option: when does QAT beat PTQ?"""
    columns = (
        Column("method"),
        Column("option"),
        Column("value"),
        Column("trainings"),
        Column(BETTER),
        Column(UNSURE),
        Column(WORSE),
        Column(DIVERGED),
        Column("best gain, dB", 2),
    )
    rows: list[Sequence[Cell]] = []
    for method in results["methods"]:
        cells = [cell for cell in results["cells"] if cell["method"] == method]
        for factor in _varied(results):
            for value in sorted({cell[factor] for cell in cells}):
                part = [cell for cell in cells if cell[factor] == value]
                counts, best = counted(part, measure), best_cell(part, measure)
                rows.append(
                    (
                        method,
                        _WORDS[factor],
                        f"{value:g}",
                        len(part),
                        *(counts[name] for name in (BETTER, UNSURE, WORSE, DIVERGED)),
                        None if best is None else best[measure]["gain_db"],
                    )
                )
    return Table(columns, rows)


def _curves(results: Json, measure: str, method: str) -> bytes:
    factor, unit = _UNITS[measure]
    cells = [cell for cell in results["cells"] if cell["method"] == method]
    rates, batches, data = (
        sorted({cell[name] for cell in cells}) for name in ("learning_rate", "batch", "data")
    )
    runs: dict[tuple[Any, ...], list[Json]] = {}
    for cell in cells:
        key = (cell["learning_rate"], cell["batch"], cell["data"], cell["seed"])
        runs.setdefault(key, []).append(cell)
    before = factor * results["ptq"][method][measure]["mean"]
    with drawing(7.0, 3.8) as figure:
        axes: Any = figure.axes
        axes.axhline(before, color=INK, lw=1, ls=(0, (1, 1)), label="PTQ")
        for (rate, batch, prompts, seed), each in runs.items():
            alive = [cell for cell in each if not cell["diverged"]]
            label = f"{rate:g}, batch {batch}, data {prompts}" + (f", seed {seed}" if seed else "")
            axes.plot(
                [0, *(cell["step"] for cell in alive)],
                [before, *(factor * cell[measure]["mean"] for cell in alive)],
                ls=_LINES[batches.index(batch) % len(_LINES)],
                marker=_MARKERS[data.index(prompts) % len(_MARKERS)],
                color=SERIES[rates.index(rate) % len(SERIES)],
                ms=3.5,
                lw=1.1,
                label=label,
            )
        axes.set_yscale("log")
        figure.label_logarithm(axes.yaxis)
        figure.whole_numbers()
        axes.set(xlabel="steps", ylabel=f"{_NOUNS[measure]}{f', {unit}' if unit else ''}")
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=7)
    return figure.png


def _page(results: Json, tables: Mapping[str, Table], figures: Mapping[str, bytes]) -> Page:
    facts = results["measures"][next(iter(results["measures"]))]
    page = Page(
        "When does QAT beat PTQ?",
        f"Straight-through fine-tuning with the {results['loss']} loss, measured on "
        f"{facts['values']} held-out samples of {facts['prompts']} prompts, beside PTQ (0 steps) "
        "and the same training in BF16. Intervals and tests are over prompts, paired; p by Holm "
        "over each column. Each cell is one training with one seed: what is said of it holds for "
        "that trained model on other prompts, not for another training with the same options.",
    )
    for sentence in results["findings"]:
        page.finding(sentence)
    fixed = [factor for factor in FACTORS if factor not in _varied(results)]
    page.facts(
        {"linears of recipe": results["recipe"]}
        | {_WORDS[factor]: f"{results['cells'][0][factor]:g}" for factor in fixed}
    )
    for measure in results["measures"]:
        noun = _NOUNS[measure]
        page.heading(f"Over the steps: {noun}")
        for method in results["methods"]:
            page.figure(
                figures[f"{measure}-{method}"],
                f"{method}: mean on held-out samples. Colours are learning rates, line styles "
                "batches, marks the number of prompts trained on.",
            )
        page.heading(f"When QAT beats PTQ: {noun}")
        page.text(
            "Each training at each number of steps counts once. Equal steps are not equal samples: "
            "a step learns from as many as the batch has. The best gain was picked on the samples "
            "that it is measured on, so it is likely too high."
        )
        page.table(tables[f"{measure}-when"])
        page.heading(f"All trainings: {noun}")
        page.table(tables[f"{measure}-cells"])
        page.heading(f"The controls: {noun}")
        page.text(
            "The same trainings in BF16, measured in BF16 and, as PTQ after it, under each method. "
            "The first row is without training."
        )
        page.table(tables[f"{measure}-controls"])
    return page
