"""Ask whether sets of protected blocks are judged alike with step caches and without.

On a GPU: `python -m benchmarks.quality.step_cache_protection --device cuda --count 96 --batch 48`

The miniature denoises unseen captions in BF16 and in HiFloat8 with each set of blocks protected:
without a cache, with diffusers' first-block cache and with its MagCache. All sets have their scales
from one run over the same calibration captions. Two errors are measured at the end of each
trajectory, as the SQNR of the latents: that beside BF16 with the same cache, which is what
quantization costs there, and that beside BF16 without a cache, which is what both cost. Every two
sets are compared, caption by caption. How much their difference changes with a cache is the
interaction. Intervals are over captions.

Captions of a batch run together, each with the cache's decisions that it has alone. After each
batch the table is printed and the result saved in benchmarks/results/. A batch is not begun if one
as long as the last would end after `--seconds`; the first always is.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

import quant
from benchmarks import report
from benchmarks.fixtures.fused_transformer import fused_transformer
from benchmarks.quality.batched_first_block import first_block_cache
from benchmarks.quality.miniature import MODEL
from benchmarks.report import Row
from benchmarks.speed.step_cache import count_full_passes, denoise, measure_ratios
from benchmarks.timing import device_name
from mini.architecture import HEIGHT_PX, NUM_FRAMES, TEXT_TOKENS, WIDTH_PX
from mini.evaluate import GUIDANCE_SCALE, SAMPLING_STEPS, load_pipeline
from mini.world.scenes import Split, captions_of
from quant.calibration.act_statistics import ActivationStatistics
from quant.calibration.calibrate import CalibrationPlan, calibrate_transformer
from quant.calibration.prompts import MIN_PROMPTS, PromptSet
from quant.calibration.sampler import SamplerSettings
from quant.kernels.eager import EagerKernels
from quant.studies.statistics import estimate, paired_difference
from worker.config import FirstBlockCache, MagCache, StepCache
from worker.engine.step_cache import step_cache

BF16, NO_CACHE = "bf16", "no cache"
RECIPE = "boundary-hif8"
SETS = ["proposed=31,32,34,36,38", "paper=0,1,37,38,39"]


@dataclass(slots=True)
class Found:
    """What one transformer gave with one cache, caption by caption.

    Attributes:
        beside_same: SQNR beside BF16 with the same cache, in dB.
        beside_bf16: SQNR beside BF16 without a cache, in dB.
        left_out: share of passes whose blocks did not count.
    """

    beside_same: list[float] = field(default_factory=list)
    beside_bf16: list[float] = field(default_factory=list)
    left_out: list[float] = field(default_factory=list)


Results = dict[tuple[str, str], Found]
"""By the name of the transformer and of the cache."""


@dataclass(frozen=True, slots=True)
class Study:
    """What is compared.

    Attributes:
        transformers: BF16 and then each set of protected blocks, by name.
        caches: none and then each cache, by name.
    """

    pipeline: Any
    transformers: Mapping[str, Any]
    caches: Mapping[str, StepCache | None]
    steps: int

    def measure(self, texts: Sequence[str], seeds: Sequence[int], results: Results) -> None:
        """Denoise a batch with every transformer and cache, and add what is found to `results`."""
        latents: dict[tuple[str, str], Tensor] = {}
        for name, transformer in self.transformers.items():
            self.pipeline.transformer = transformer
            for cache, setting in self.caches.items():
                with cached(self.pipeline, setting, self.steps) as passes:
                    made = denoise(self.pipeline, texts, seeds, self.steps).float().cpu()
                latents[name, cache] = made
                found = results.setdefault((name, cache), Found())
                found.beside_same += _sqnr(latents[BF16, cache], made)
                found.beside_bf16 += _sqnr(latents[BF16, NO_CACHE], made)
                found.left_out += _shares(passes, len(texts))
                print(f"{name}, {cache}: captions {seeds[0] + 1} to {seeds[-1] + 1}", flush=True)


def main(  # noqa: PLR0913, PLR0917 (typer's way: the signature is the command line)
    protect: Annotated[
        list[str], typer.Option(help="NAME=BLOCKS to protect, with commas; repeatable.")
    ] = SETS,
    count: Annotated[int, typer.Option(min=2, help="Evaluation captions.")] = 8,
    batch: Annotated[int, typer.Option(min=2, help="Captions that run together.")] = 8,
    calibration: Annotated[
        int, typer.Option(min=MIN_PROMPTS, help="Captions for scales and MagCache's ratios.")
    ] = 16,
    threshold: Annotated[float, typer.Option(help="Of the first-block cache.")] = 0.1,
    mag_threshold: Annotated[float, typer.Option(help="Of MagCache.")] = 0.12,
    seconds: Annotated[float, typer.Option(help="By when the last batch is to end.")] = 3600,
    steps: Annotated[int, typer.Option(min=2, help="Denoising steps.")] = SAMPLING_STEPS,
    model: Annotated[Path, typer.Option(help="Pipeline folder.")] = MODEL,
    device: str = "cpu",
) -> None:
    """Measure every set with every cache, and write the result after each batch."""
    ends = time.monotonic() + seconds
    sets = dict(map(read_set, protect))
    pipeline = load_pipeline(model, device)
    pipeline.set_progress_bar_config(disable=True)
    seen = captions_of(Split.CALIBRATION, calibration)
    fingerprint = quant.model_fingerprint(model)
    transformers = build_all(pipeline, sets, seen, steps, fingerprint)
    pipeline.transformer = transformers[BF16]
    ratios = measure_ratios(pipeline, seen, batch=calibration, steps=steps)
    caches: dict[str, StepCache | None] = {
        NO_CACHE: None,
        f"first block {threshold:g}": FirstBlockCache(method="first_block", threshold=threshold),
        f"MagCache {mag_threshold:g}": MagCache(
            method="mag", threshold=mag_threshold, mag_ratios=ratios
        ),
    }
    study, results = Study(pipeline, transformers, caches, steps), Results()
    settings = {
        "split": str(Split.EVALUATION),
        "calibration_captions": calibration,
        "batch": batch,
        "steps": steps,
        "guidance_scale": GUIDANCE_SCALE,
        "model": fingerprint,
        "recipe": RECIPE,
        "protected": sets,
        "mag_ratios": list(ratios),
    }
    print(
        f"scales and ratios of {calibration} captions: {ends - time.monotonic():.0f} s are left",
        flush=True,
    )
    texts, took = captions_of(Split.EVALUATION, count), 0.0
    for start in range(0, count, batch):
        begun = time.monotonic()
        if start and begun + took > ends:
            print(f"{count - start} captions are left out: no time for them", flush=True)
            break
        seeds = range(start, min(start + batch, count))
        study.measure([texts[seed] for seed in seeds], seeds, results)
        took = time.monotonic() - begun
        rows = rows_of(results, texts[: seeds.stop])
        report.print_table(rows)
        document = report.result(
            "step-cache-protection",
            device_name(pipeline.device),
            {"captions": seeds.stop} | settings,
            rows,
        )
        print(f"{seeds.stop} of {count} captions: {report.save(document)}", flush=True)


def read_set(text: str) -> tuple[str, tuple[int, ...]]:
    """Read "NAME=BLOCKS"; no blocks protect none.

    Raises:
        typer.BadParameter: it is not written so, or the name is that of BF16.
    """
    name, sign, blocks = text.partition("=")
    numbers = [each.strip() for each in blocks.split(",") if each.strip()]
    if not sign or name in ("", BF16) or not all(each.isdecimal() for each in numbers):
        raise typer.BadParameter(f"{text!r} is no NAME=BLOCKS, such as paper=0,1,37,38,39")
    return name, tuple(sorted(map(int, numbers)))


def build_all(
    pipeline: Any,
    sets: Mapping[str, tuple[int, ...]],
    texts: Sequence[str],
    steps: int,
    fingerprint: str,
) -> dict[str, Any]:
    """Build BF16 and every set on eager kernels, all sets with scales of one run over `texts`.

    What BF16 computes does not depend on which blocks a recipe protects, so one run measures the
    inputs of all linears. Its captions run together, since a scale is of all that was seen.
    """
    source, kernels = pipeline.transformer, EagerKernels()
    blocks = source.config.num_layers
    recipe = replace(quant.QuantRecipe.load(RECIPE), total_blocks=blocks, protected_blocks=())
    size = (WIDTH_PX, HEIGHT_PX)
    sampler = SamplerSettings(size, NUM_FRAMES, steps, GUIDANCE_SCALE, TEXT_TOKENS)
    plan = CalibrationPlan(
        fingerprint,
        recipe,
        PromptSet(tuple(texts), str(Split.CALIBRATION)),
        replace(sampler, timestep_groups=1),
    )

    def run(index: int, statistics: ActivationStatistics) -> None:
        if index == 0:  # the other captions are in its company
            statistics.enter(0)
            denoise(pipeline, texts, range(len(texts)), steps)

    scales = calibrate_transformer(source, plan, run)
    built = {BF16: fused_transformer(source, kernels)}
    for name, protected in sets.items():
        chosen = replace(recipe, protected_blocks=protected)
        built[name] = fused_transformer(source, kernels, chosen, scales)
    return built


@contextmanager
def cached(pipeline: Any, setting: StepCache | None, steps: int) -> Iterator[list[Tensor]]:
    """Cache within the context, each sample of a batch as if it were alone.

    Yields a list that says, after the context, for each pass whether blocks were left out: [B] bool
    with the first-block cache, and [1] with MagCache, which decides by the step alone.
    """
    if isinstance(setting, FirstBlockCache):
        with first_block_cache(pipeline.transformer, setting.threshold) as passes:
            yield passes
        return
    passes = []
    with count_full_passes(pipeline) as full, step_cache(pipeline.transformer, setting, steps):
        yield passes
    passes += [torch.tensor([number >= len(full)]) for number in range(2 * steps)]


def rows_of(results: Results, texts: list[str]) -> list[Row]:
    """Return the rows of every cache: each set beside BF16, the sets in pairs, interactions."""
    caches = list(dict.fromkeys(cache for _, cache in results))
    names = list(dict.fromkeys(name for name, _ in results if name != BF16))
    rows = []
    for cache in caches:
        if cache != NO_CACHE:
            alone = results[BF16, cache]
            what = f"{cache}: {BF16} beside {BF16} without a cache"
            rows.append(_row(what, alone.beside_bf16, texts))
            rows.append(_row(f"{cache}: {BF16}, passes left out", alone.left_out, texts, "share"))
        for name in names:
            found = results[name, cache]
            beside = f"{cache}: {name} beside {BF16}"
            if cache == NO_CACHE:
                rows.append(_row(beside, found.beside_same, texts))
                continue
            rows.append(_row(f"{beside} with the same cache", found.beside_same, texts))
            rows.append(_row(f"{beside} without a cache", found.beside_bf16, texts))
            rows.append(_row(f"{cache}: {name}, passes left out", found.left_out, texts, "share"))
        for pair in combinations(names, 2):
            rows += _pair_rows(results, cache, pair, texts)
    return rows


def _pair_rows(
    results: Results, cache: str, pair: tuple[str, str], texts: list[str]
) -> Iterator[Row]:
    """Yield by what one set is better than another, and by how much more than without a cache."""
    first, second = (results[name, cache] for name in pair)
    what = f"{cache}: {pair[0]} minus {pair[1]}"
    yield from _difference_rows(what, first.beside_same, second.beside_same, texts)
    if cache == NO_CACHE:
        return
    included = first.beside_bf16, second.beside_bf16
    yield from _difference_rows(f"{what}, cache included", *included, texts)
    with_cache, without = (
        [a - b for a, b in zip(*(results[name, each].beside_same for name in pair), strict=True)]
        for each in (cache, NO_CACHE)
    )
    yield from _difference_rows(f"{what}, minus that without a cache", with_cache, without, texts)


def _row(what: str, values: list[float], texts: list[str], unit: str = "dB") -> Row:
    each = estimate(values, texts)
    return Row(what, round(each.mean, 3), unit, low=each.low, high=each.high)


def _difference_rows(what: str, a: list[float], b: list[float], texts: list[str]) -> Iterator[Row]:
    """Yield a difference's mean, and its median, which one lost trajectory moves little."""
    each = paired_difference(a, b, texts)
    yield Row(what, round(each.mean, 3), "dB", low=each.low, high=each.high)
    yield Row(f"{what}, median", round(each.median, 3), "dB")


def _shares(passes: list[Tensor], count: int) -> list[float]:
    """Return for each sample the share of passes whose blocks were left out."""
    return torch.stack([each.expand(count) for each in passes]).double().mean(0).tolist()


def _sqnr(references: Tensor, videos: Tensor) -> list[float]:
    """Return the SQNR of each latent video, in dB; equal ones get the report's bound."""
    return [
        min(report.EQUAL_DB, float(quant.sqnr_db(reference, video)))
        for reference, video in zip(references, videos, strict=True)
    ]


if __name__ == "__main__":
    typer.run(main)
