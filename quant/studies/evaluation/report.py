"""Turn an evaluation's numbers into results, tables, figures and a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from quant.studies.evaluation.calibrations import unequal_calibrations
from quant.studies.evaluation.candidates import BF16, Candidate
from quant.studies.evaluation.generate import Plan
from quant.studies.evaluation.measures import Measure
from quant.studies.evaluation.verdict import Comparison, divergence_words
from quant.studies.evaluation.video_files import Video
from quant.studies.output.page import Page
from quant.studies.output.plots import INK, SERIES, drawing
from quant.studies.output.study_folder import Json
from quant.studies.output.table import Column, Table
from quant.studies.statistics import estimate

_GRID_PROMPTS = 5
"""As many rows as the paper's figure of videos has."""

_LETTERS = 20
"""As many as fit below a panel of scores, side by side."""


def report(
    plan: Plan,
    candidates: Sequence[Candidate],
    measures: Sequence[Measure],
    comparisons: Sequence[Comparison],
    far: Mapping[str, Sequence[int]],
    videos: Mapping[str, Sequence[Video]],
) -> tuple[Json, dict[str, Table], dict[str, bytes], Page]:
    """Build everything that `StudyFolder.finish` writes."""
    results: Json = {
        "candidates": {each.name: each.recipe.name for each in candidates},
        "unequal_calibrations": unequal_calibrations(candidates),
        "measures": {each.name: _as_json(each) for each in measures},
        "comparisons": [
            {
                "judge": each.measure.name,
                "first": each.first,
                "second": each.second,
                **asdict(each.difference),
                "holm_p": each.holm_p,
                "shown": each.is_shown,
                "words": each.words(),
            }
            for each in comparisons
        ],
        "diverged": {name: list(places) for name, places in far.items()},
        "prompts": len(plan.prompts.prompts),
        "videos": plan.videos,
    }
    tables = {
        "judges": _judges_table(measures),
        "comparisons": _comparisons_table(comparisons),
        "scores": _scores_table(measures),
    }
    figures = {"scores": scores_figure(measures), "grid": grid_figure(plan, videos)}
    page = _page(plan, results, tables, figures, comparisons, far)
    _add_videos(page, plan, figures["grid"], videos)
    return results, tables, figures, page


def scores_figure(measures: Sequence[Measure]) -> bytes:
    """Draw every number of every judge: a panel for each judge, a column for each candidate."""
    columns = min(3, len(measures))
    rows = -(-len(measures) // columns)
    names = list(dict.fromkeys(name for each in measures for name in each.values))
    color = {name: SERIES[place % len(SERIES)] for place, name in enumerate(sorted(names))}
    is_long = max(map(len, names)) * len(names) > _LETTERS
    slant = {"rotation": 25, "ha": "right", "rotation_mode": "anchor"} if is_long else {}
    with drawing(7.4, 2.5 * rows) as figure:
        figure.figure.clf()
        grid: Any = figure.figure.subplots(rows, columns, squeeze=False).ravel()
        for axes, measure in zip(grid, measures, strict=False):
            for place, (name, values) in enumerate(measure.values.items()):
                # Spread by a fixed rule: equal results give equal bytes.
                spread = place - 0.1 + 0.4 * ((np.arange(len(values)) * 0.618034) % 1 - 0.5)
                axes.plot(spread, values, ".", color=color[name], ms=6, alpha=0.6, mew=0)
                each = estimate(values, measure.prompts)
                beside = place + 0.25
                axes.plot((beside, beside), (each.low, each.high), color=INK, lw=1.2)
                axes.plot(beside, each.mean, "o", color=INK, ms=3.5)
            axes.set_xticks(range(len(measure.values)), list(measure.values), **slant)
            axes.set_xlim(-0.6, len(measure.values) - 0.4)
            axes.grid(visible=False, axis="x")
            better = "higher" if measure.higher_is_better else "lower"
            axes.set_title(f"{_with_unit(measure)}\n({better} is better)", fontsize=8, color=INK)
        for axes in grid[len(measures) :]:
            axes.set_axis_off()
        figure.figure.tight_layout()
    return figure.png


def grid_figure(plan: Plan, videos: Mapping[str, Sequence[Video]]) -> bytes:
    """Draw the frame in the middle of the first prompts' videos, a column for each candidate."""
    count = min(_GRID_PROMPTS, len(plan.prompts.prompts))
    width, height = plan.sampler.size
    columns = len(videos)
    across = min(2.0, 7.4 / columns)
    tall, words = across * height / width, 0.25  # of a row, and of the prompt below it
    with drawing(across * columns, (tall + words) * count) as figure:
        figure.figure.clf()
        grid: Any = figure.figure.subplots(count, columns, squeeze=False)
        for column, (name, each) in enumerate(videos.items()):
            for row in range(count):
                frames = each[row * plan.draws].frames()
                axes = grid[row][column]
                axes.imshow(frames[len(frames) // 2])
                axes.set_axis_off()
                if row == 0:
                    axes.set_title(name, fontsize=9, color=INK)
        for row in range(count):
            text = plan.prompts.prompts[row]
            short = text if len(text) <= 90 else f"{text[:89]}…"
            grid[row][0].text(
                0, -0.03, short, transform=grid[row][0].transAxes, va="top", fontsize=6, color=INK
            )
        figure.figure.subplots_adjust(0, 0, 1, 1, wspace=0.03, hspace=words / tall)
    return figure.png


def _with_unit(measure: Measure) -> str:
    return f"{measure.name}, {measure.unit}" if measure.unit else measure.name


def _as_json(measure: Measure) -> Json:
    return {
        "unit": measure.unit,
        "higher_is_better": measure.higher_is_better,
        "needs": measure.needs,
        "candidates": {
            name: {**asdict(estimate(values, measure.prompts)), "scores": list(values)}
            for name, values in measure.values.items()
        },
    }


def _judges_table(measures: Sequence[Measure]) -> Table:
    columns = (
        Column("judge", whole=True),
        Column("better"),
        Column("candidate"),
        Column("mean", significant=4),
        Column("95 % from", significant=4),
        Column("to", significant=4),
        Column("median prompt", significant=4),
        Column("worst", significant=4),
        Column("prompts"),
        Column("samples"),
    )
    rows = []
    for measure in measures:
        for name, values in measure.values.items():
            each = estimate(values, measure.prompts)
            worst = min(values) if measure.higher_is_better else max(values)
            better = "higher" if measure.higher_is_better else "lower"
            numbers = (each.mean, each.low, each.high, each.median, float(worst))
            rows.append((_with_unit(measure), better, name, *numbers, each.prompts, each.values))
    return Table(columns, rows)


def _comparisons_table(comparisons: Sequence[Comparison]) -> Table:
    columns = (
        Column("judge", whole=True),
        Column("first − second"),
        Column("shown"),
        Column("p (Holm)", significant=2),
        Column("mean", significant=3),
        Column("95 % from", significant=3),
        Column("to", significant=3),
        Column("median prompt", significant=3),
        Column("p (sign)", significant=2),
        Column("p (permuted)", significant=2),
        Column("detectable", significant=3),
    )
    rows = [
        (
            _with_unit(each.measure),
            f"{each.first} − {each.second}",
            "yes" if each.is_shown else "no",
            each.holm_p,
            each.difference.mean,
            each.difference.low,
            each.difference.high,
            each.difference.median,
            each.difference.sign_p,
            each.difference.permutation_p,
            each.difference.detectable,
        )
        for each in comparisons
    ]
    shown = frozenset(place for place, each in enumerate(comparisons) if each.is_shown)
    return Table(columns, rows, shown)


def _scores_table(measures: Sequence[Measure]) -> Table:
    columns = (Column("judge"), Column("candidate"), Column("prompt"), Column("score"))
    rows = [
        (measure.name, name, prompt, value)
        for measure in measures
        for name, values in measure.values.items()
        for prompt, value in zip(measure.prompts, values, strict=True)
    ]
    return Table(columns, rows)


def _page(
    plan: Plan,
    results: Json,
    tables: Mapping[str, Table],
    figures: Mapping[str, bytes],
    comparisons: Sequence[Comparison],
    far: Mapping[str, Sequence[int]],
) -> Page:
    sampler = plan.sampler
    listed = ", ".join(f"{name} ({recipe})" for name, recipe in results["candidates"].items())
    page = Page(
        "How good the quantized videos are",
        f"{listed} beside BF16: {results['prompts']} prompts, {plan.draws} of each, "
        f"{sampler.num_frames} frames of {sampler.size_text}, "
        f"{sampler.num_inference_steps} step{'s' * (sampler.num_inference_steps != 1)}. Intervals "
        "and tests are over prompts.",
    )
    for each in comparisons:
        page.finding(each.words())
    for words in divergence_words(far, plan.videos):
        page.finding(words)
    if results["unequal_calibrations"]:
        page.finding(results["unequal_calibrations"])
    if not comparisons:
        page.text("One candidate, and judges that need the videos of BF16: nothing to compare.")
    page.heading("Scores")
    page.figure(
        figures["scores"],
        "A dot for each sample; mean with its 95 % interval. Pair judges compare with the BF16 "
        "video of the same prompt and seed.",
    )
    page.table(tables["judges"])
    page.heading("Differences")
    page.table(tables["comparisons"])
    page.text(
        "Shown: the interval leaves out 0 and the test agrees after Holm's adjustment for all "
        f"comparisons here. {BF16} is no upper bound: a candidate may be better by chance. "
        "Detectable: the difference that a single test shows with a probability of 80 %."
    )
    return page


def _add_videos(page: Page, plan: Plan, grid: bytes, videos: Mapping[str, Sequence[Video]]) -> None:
    """Show frames, link each video by prompt and candidate, and say how they were sampled."""
    page.heading("Videos")
    page.figure(grid, "The frame in the middle of the video; the first seed.")
    page.text(
        "All videos, by their seeds, in the folder that this page is in: lossless H.264 of RGB, "
        "which not every browser plays; mpv and VLC do."
    )
    starts = range(0, plan.videos, plan.draws)
    rows = [
        (
            prompt,
            [
                {str(video.seed): video.link for video in each[start : start + plan.draws]}
                for each in videos.values()
            ],
        )
        for start, prompt in zip(starts, plan.prompts.prompts, strict=True)
    ]
    page.links(("prompt", *videos), rows)
    page.facts(
        {
            "prompts": f"{plan.prompts.file}, SHA-256 {plan.prompts.sha256}",
            "first seed": str(plan.sampler.seed),
            "guidance": f"{plan.sampler.guidance_scale:g}",
        }
    )
