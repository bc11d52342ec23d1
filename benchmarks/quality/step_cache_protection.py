"""Ask whether sets of protected blocks are judged alike with step caches and without.

`python -m benchmarks.quality.step_cache_protection --candidate auto=FILE --candidate paper=FILE`

The miniature denoises unseen captions in BF16 and by every candidate, a scales file of its own:
without a cache, with diffusers' first-block cache and with its MagCache. Two errors are measured at
the end of each trajectory, as the SQNR of the latents: that beside BF16 with the same cache, which
is what quantization costs there, and that beside BF16 without a cache, which is what both cost.
Every two candidates are compared, caption by caption.

It prints a table and saves the result in benchmarks/results/.
"""

from __future__ import annotations

import json
from itertools import combinations
from typing import Annotated

import typer
from torch import Tensor

import quant
from benchmarks import report
from benchmarks.quality.miniature import MODEL
from benchmarks.report import Row
from benchmarks.speed.step_cache import denoise, measure_ratios
from mini.evaluate import GUIDANCE_SCALE, SAMPLING_STEPS, load_pipeline
from mini.world.scenes import Split, captions_of
from quant.studies.evaluation.candidates import build_bf16, read_candidates
from quant.studies.statistics import estimate, paired_difference
from worker.config import FirstBlockCache, MagCache, StepCache
from worker.engine.step_cache import step_cache

BF16, NO_CACHE = "bf16", "no cache"


def main(
    candidate: Annotated[list[str], typer.Option(help="NAME=PATH of a scales file; repeatable.")],
    count: Annotated[int, typer.Option(min=2, help="Evaluation captions.")] = 8,
    calibration: Annotated[int, typer.Option(min=1, help="Captions for MagCache's ratios.")] = 2,
    threshold: Annotated[float, typer.Option(help="Of the first-block cache.")] = 0.1,
    mag_threshold: Annotated[float, typer.Option(help="Of MagCache.")] = 0.12,
    device: str = "cpu",
) -> None:
    """Measure every candidate with every cache, and write the result."""
    pipeline = load_pipeline(MODEL, device)
    pipeline.set_progress_bar_config(disable=True)
    source = pipeline.transformer
    candidates = read_candidates(candidate, MODEL, quant.model_fingerprint(MODEL))
    transformers = {BF16: build_bf16(source)}
    transformers |= {each.name: each.build(source) for each in candidates}
    pipeline.transformer = transformers[BF16]
    ratios = measure_ratios(pipeline, captions_of(Split.CALIBRATION, calibration))
    caches: dict[str, StepCache | None] = {
        NO_CACHE: None,
        f"first block {threshold:g}": FirstBlockCache(method="first_block", threshold=threshold),
        f"MagCache {mag_threshold:g}": MagCache(
            method="mag", threshold=mag_threshold, mag_ratios=ratios
        ),
    }
    texts = captions_of(Split.EVALUATION, count)
    found: dict[tuple[str, str], list[Tensor]] = {}
    for seed, text in enumerate(texts):
        for name, transformer in transformers.items():
            pipeline.transformer = transformer
            for cache, setting in caches.items():
                with step_cache(transformer, setting, SAMPLING_STEPS):
                    latents = denoise(pipeline, [text], [seed])
                found.setdefault((name, cache), []).append(latents.float().cpu())
        print(f"caption {seed + 1} of {count}", flush=True)
    names = [each.name for each in candidates]
    rows = [row for cache in caches for row in rows_of(cache, names, found, texts)]
    report.print_table(rows)
    settings = {
        "captions": count,
        "split": str(Split.EVALUATION),
        "steps": SAMPLING_STEPS,
        "guidance_scale": GUIDANCE_SCALE,
        "model": quant.model_fingerprint(MODEL),
        "protected": {each.name: list(each.recipe.protected_blocks) for each in candidates},
        "caches": list(caches),
    }
    document = report.result("step-cache-protection", device, settings, rows)
    report.save(document)
    print(json.dumps(document))


def rows_of(
    cache: str,
    names: list[str],
    found: dict[tuple[str, str], list[Tensor]],
    texts: list[str],
) -> list[Row]:
    """Return the rows of one cache: each candidate beside BF16, and the candidates in pairs."""
    rows = []
    if cache != NO_CACHE:
        cost = _sqnr(found[BF16, cache], found[BF16, NO_CACHE])
        rows.append(_row(f"{cache}: BF16 beside BF16 without a cache", cost, texts))
    own = {name: _sqnr(found[name, cache], found[BF16, cache]) for name in names}
    for name in names:
        rows.append(_row(f"{cache}: {name} beside BF16 with the same cache", own[name], texts))
        if cache != NO_CACHE:
            both = _sqnr(found[name, cache], found[BF16, NO_CACHE])
            rows.append(_row(f"{cache}: {name} beside BF16 without a cache", both, texts))
    for first, second in combinations(names, 2):
        each = paired_difference(own[first], own[second], texts)
        what = f"{cache}: {first} minus {second}"
        rows.append(Row(what, round(each.mean, 3), "dB", low=each.low, high=each.high))
    return rows


def _row(what: str, values: list[float], texts: list[str]) -> Row:
    each = estimate(values, texts)
    return Row(what, round(each.mean, 3), "dB", low=each.low, high=each.high)


def _sqnr(videos: list[Tensor], references: list[Tensor]) -> list[float]:
    """Return the SQNR of each latent video, in dB; equal ones get the report's bound."""
    return [
        min(report.EQUAL_DB, float(quant.sqnr_db(reference, video)))
        for video, reference in zip(videos, references, strict=True)
    ]


if __name__ == "__main__":
    typer.run(main)
