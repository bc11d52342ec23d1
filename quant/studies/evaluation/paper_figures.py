"""Gather the paper's figures, for any model, from the folders of finished studies.

figure 1b  how each block changes the residual stream      `analyze`
figure 2   the largest magnitudes, with protected blocks   `analyze`
figure 3   the scores of every video by each method        `evaluate`
figure 4   prompts x methods, the frame in the middle      `evaluate`
figure 5   sets of protected blocks                        `ablate`
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quant.errors import StudyError
from quant.studies.evaluation.candidates import BF16
from quant.studies.output.page import Page
from quant.studies.output.study_folder import Json, StudyFolder, read_results
from quant.studies.output.table import Column, Table

_FIGURES = (
    ("figure-1b", "analyze", "update", "Figure 1b: how much each block changes the stream."),
    ("figure-2", "analyze", "activations", "Figure 2: largest magnitude after each block."),
    ("figure-3", "evaluate", "scores", "Figure 3: scores of every video by each method."),
    ("figure-4", "evaluate", "grid", "Figure 4: prompts x methods, the frame in the middle."),
    ("figure-5", "ablate", "sets", "Figure 5: sets of protected blocks on held-out prompts."),
)
Row = tuple[str, str, str, str]


@dataclass(frozen=True, slots=True)
class Studies:
    """The folders of finished studies of one model, by their command."""

    folders: dict[str, Path]
    model: str

    @classmethod
    def open(cls, folders: dict[str, Path]) -> Studies:
        """Check that all are finished, and of one model.

        Raises:
            StudyError: there are none, one is not finished, or two are of different models.
        """
        if not folders:
            raise StudyError("give at least one of --analysis, --evaluation and --ablation")
        models = {
            command: StudyFolder.finished(path, command).identity["model"]
            for command, path in folders.items()
        }
        first = next(iter(models))
        for command, model in models.items():
            if model != models[first]:
                raise StudyError(
                    f"{folders[command]} is of another model than {folders[first]}: give studies "
                    "of one model"
                )
        return cls(folders, models[first])

    def results(self, command: str) -> Json | None:
        """Return a study's results, or None if it is not given."""
        return read_results(self.folders[command], command) if command in self.folders else None


def report(studies: Studies) -> tuple[Json, dict[str, Table], dict[str, bytes], Page]:
    """Build everything that `StudyFolder.finish` writes.

    Raises:
        StudyError: a folder lacks a figure.
    """
    rows = [
        *_analysis_rows(studies.results("analyze")),
        *_ablation_rows(studies.results("ablate")),
        *_evaluation_rows(studies.results("evaluate")),
    ]
    columns = tuple(map(Column, ("the paper claims", "what we see", "n", "95 % interval")))
    table = Table(columns, rows)
    page = Page(
        "The paper's figures, for this model",
        "Drawn from the folders of finished studies. Each of those has a page with all numbers.",
    )
    page.heading("Claims")
    page.table(table)
    unequal = (studies.results("evaluate") or {}).get("unequal_calibrations")
    if unequal:
        page.finding(unequal)
    page.text("The paper shows 5 prompts without intervals. A dash: there is no interval for it.")
    figures: dict[str, bytes] = {}
    page.heading("Figures")
    for name, command, source, caption in _FIGURES:
        if command not in studies.folders:
            page.text(f"{caption} Not here: it needs a folder of `python -m quant {command}`.")
            continue
        figures[name] = _read(studies.folders[command] / "figures" / f"{source}.png")
        page.figure(figures[name], caption)
    page.facts({"model": studies.model, **{k: str(v) for k, v in studies.folders.items()}})
    keys = ("claim", "seen", "n", "interval")
    results: Json = {
        "claims": [dict(zip(keys, row, strict=True)) for row in rows],
        "unequal_calibrations": unequal,
    }
    return results, {"claims": table}, figures, page


def _analysis_rows(found: Json | None) -> list[Row]:
    if found is None:
        return []
    blocks, rows = len(found["blocks"]), list[Row]()
    claims = {
        "largest magnitude of the stream": "Blocks of extreme activations are those that suffer",
        "update share": "(not in the paper) the update share tells which blocks suffer",
    }
    for name, claim in claims.items():
        rho, p = (found["proxies"][name][key] for key in ("spearman", "p"))
        rows.append(
            (
                claim,
                f"Spearman {rho:+.2f} of {name} and error energy, p {p:.2g}".replace(" -", " −"),
                f"{blocks} blocks, {found['prompts']} prompts",
                _interval(*_rank_interval(rho, blocks), ""),
            )
        )
    removed = found["energy_removed"]
    rows.append(
        (
            "The blocks at both ends are those to protect",
            f"the paper's set takes away {removed['paper']:.0%} of the error energy of single "
            f"blocks, the proposed {removed['proposed']:.0%}",
            f"{found['prompts']} prompts",
            "–",
        )
    )
    return rows


def _ablation_rows(found: Json | None) -> list[Row]:
    if found is None:
        return []
    against, rows = found["against_paper"], list[Row]()
    n = f"{found['prompts']} prompts, {found['points']} points"
    for name in ("none", "entry only", "exit only", "auto"):
        each = against[name]
        claim = f"Both ends protected is better than {name}"
        if name == "auto":
            claim = "(not in the paper) a set chosen by the errors is better"
        words = f"{name} − both ends: {100 * each['mean']:+.3f} % error energy"
        words = words.replace(": -", ": −") + ("" if each["real"] else ", not told apart")
        rows.append((claim, words, n, _interval(100 * each["low"], 100 * each["high"], " %")))
    percentile = found["sets"]["both ends"]["percentile"]
    if percentile is not None:
        rows.append(
            (
                "The choice of blocks matters",
                f"both ends is better than {percentile:.0f} % of random sets of its size",
                f"{found['random_sets']} random sets",
                "–",
            )
        )
    return rows


def _evaluation_rows(found: Json | None) -> list[Row]:
    if found is None:
        return []
    rows: list[Row] = []
    n = f"{found['prompts']} prompts, {found['videos']} videos"
    for each in found["comparisons"]:
        if each["second"] != BF16:
            continue
        measure = found["measures"][each["judge"]]
        unit = f" {measure['unit']}".rstrip()
        words = f"{each['judge']}, {each['first']} − {BF16}: {each['mean']:+.3g}{unit}"
        words = words.replace(": -", ": −") + ("" if each["shown"] else ", not told apart")
        samples = n if each["judge"] != "velocity-error" else f"{each['prompts']} prompts"
        interval = _interval(each["low"], each["high"], unit)
        rows.append(("Quantized videos score as high as BF16's", words, samples, interval))
    return rows


def _rank_interval(rho: float, count: int) -> tuple[float | None, float | None]:
    """Return the 95 % interval of Spearman's correlation by Fisher's transform (Bonett, 2000)."""
    if count < 5 or abs(rho) >= 1:
        return None, None
    wide = 1.96 * math.sqrt((1 + rho**2 / 2) / (count - 3))
    return math.tanh(math.atanh(rho) - wide), math.tanh(math.atanh(rho) + wide)


def _interval(low: float | None, high: float | None, unit: str) -> str:
    if low is None or high is None:
        return "–"
    return f"[{low:.3g}, {high:.3g}]{unit}".replace("-", "−")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise StudyError(f"{path} cannot be read: run that study again") from error


def folders_of(pairs: Sequence[tuple[str, Path | None]]) -> dict[str, Any]:
    """Return the folders that are given, by their command."""
    return {command: path for command, path in pairs if path is not None}
