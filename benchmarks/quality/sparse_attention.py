"""Measure what sparse self-attention costs in quality.

`python -m benchmarks.quality.sparse_attention`

The miniature makes videos of unseen captions in `w8a8` with dense attention, and with the same
seeds and sparse attention at several shares of the softmax's mass. It runs in the emulation of
plain torch (`quant.kernels.sparse.blocks`), in the blocks of tokens of the recipe. For each share
the result has

- the achieved density and mass, over the steps and blocks that are sparse;
- the velocity's error energy beside dense attention, in percent, at inputs of the dense runs in
  steps that would be sparse, with blocks chosen for these inputs;
- the PSNR beside the dense videos, and whether the oracle sees everything that the caption says.

The last settings combine sparse attention with a step cache, beside the cache alone. Nothing is
timed: the emulation computes every score.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor

import quant
from benchmarks import report
from benchmarks.fixtures.fused_transformer import fused_transformer
from benchmarks.quality.miniature import MODEL, SCALES, bootstrap, psnr_db, rate_row
from benchmarks.report import Row
from benchmarks.speed.step_cache import decode, denoise
from mini.evaluate import (
    GUIDANCE_SCALE,
    SAMPLING_STEPS,
    Rate,
    contact_sheet,
    load_pipeline,
    side_by_side,
)
from mini.world.oracle import Frames, verdicts
from mini.world.scenes import Split, captions_of, parse_caption
from quant.kernels.eager import EagerKernels
from quant.recipe.sparse import SparseSettings
from worker.config import FirstBlockCache
from worker.engine.step_cache import step_cache

RECIPE = "boundary-hif8-mini-sparse"
DENSE = "dense"
CACHE = FirstBlockCache(method="first_block", threshold=0.1)
VELOCITY_EVERY = 5
"""Every how many passes of a dense run its input is kept to compare velocities."""

Point = tuple[dict[str, Any], Tensor]
"""The inputs of a pass, and its velocity."""


@dataclass(slots=True)
class Setting:
    """A transformer and what is measured of it."""

    transformer: Any
    cache: FirstBlockCache | None = None
    videos: list[Frames] = field(default_factory=list)
    kept: list[tuple[float, float]] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)


def main(
    count: Annotated[int, typer.Option(min=2, help="Evaluation captions.")] = 3,
    shares: Annotated[str, typer.Option(help="Of mass.")] = "0.7,0.9,0.95,0.98",
    tile: Annotated[str, typer.Option(help="Frames, rows, columns; the recipe's if empty.")] = "",
    cached: Annotated[float, typer.Option(help="The share with a step cache; 0: none.")] = 0.95,
    sheet: Annotated[Path | None, typer.Option(help="Write a contact sheet here.")] = None,
) -> None:
    """Measure every share, and write the result."""
    pipeline = load_pipeline(MODEL, "cpu")
    pipeline.set_progress_bar_config(disable=True)
    recipe = quant.QuantRecipe.load(RECIPE)
    sparse = recipe.sparse
    assert sparse is not None, "the recipe is a sparse one"
    if tile:
        table = sparse.to_table() | {"tile": [int(each) for each in tile.split(",")]}
        sparse = SparseSettings.from_table(table)
    scales = quant.load_scales(SCALES, model_folder=MODEL, recipe=recipe)
    quant.check_scales(scales, model_fingerprint=quant.model_fingerprint(MODEL), recipe=recipe)

    def build(share: float | None) -> Any:
        chosen = recipe.calibrated
        if share is not None:
            chosen = replace(recipe, sparse=replace(sparse, share_of_mass=share))
        return fused_transformer(pipeline.transformer, EagerKernels(), chosen, scales)

    settings = _settings(build, [float(each) for each in shares.split(",")], cached)
    texts = captions_of(Split.EVALUATION, count)
    described = {
        "captions": count,
        "split": str(Split.EVALUATION),
        "steps": SAMPLING_STEPS,
        "guidance_scale": GUIDANCE_SCALE,
        "model": quant.model_fingerprint(MODEL),
        "sparse": sparse.to_table(),
        "blocks": len(recipe.quantized_blocks),
        "step_cache": CACHE.model_dump(),
    }
    rows: list[Row] = []
    for name in _measure(pipeline, settings, texts, sparse.dense_steps):
        rows += _rows(name, settings[name], settings, texts)
        # After each setting, so that a run that is stopped leaves what it has measured.
        report.save(report.result("sparse-attention", "cpu", described, rows))
        print(f"{name}: done", flush=True)
    report.print_table(rows)
    if sheet is not None:
        columns = [
            contact_sheet(name, list(zip(texts, each.videos, strict=True)))
            for name, each in settings.items()
        ]
        side_by_side(columns).save(sheet, optimize=True)


def _settings(
    build: Callable[[float | None], Any], shares: list[float], cached: float
) -> dict[str, Setting]:
    """Build what is compared, by name; `DENSE` comes first.

    Args:
        build: builds the transformer of a share, or the dense one.
    """
    found = {DENSE: Setting(build(None))}
    found |= {f"mass {share:g}": Setting(build(share)) for share in shares}
    if not cached:
        return found
    name = f"first_block {CACHE.threshold:g}"
    found[name] = Setting(build(None), CACHE)
    found[f"mass {cached:g} and {name}"] = Setting(build(cached), CACHE)
    return found


def _measure(
    pipeline: Any, settings: dict[str, Setting], texts: list[str], first_step: int
) -> Iterator[str]:
    """Make the videos of every setting, compare velocities from a step on, and yield its name.

    All captions run in one batch; with a step cache one by one, as it decides for a whole batch.
    """
    points: list[Point] = []
    for name, setting in settings.items():
        pipeline.transformer = setting.transformer
        sparse = quant.sparse_attention_of(setting.transformer)
        size = len(texts) if setting.cache is None else 1
        for start in range(0, len(texts), size):
            numbers = range(start, start + size)
            with (
                _recorded(setting.transformer, points, first_step)
                if name == DENSE
                else nullcontext(),
                step_cache(setting.transformer, setting.cache, SAMPLING_STEPS),
                quant.denoising_run(setting.transformer),
            ):
                latents = denoise(pipeline, [texts[n] for n in numbers], numbers)
            setting.videos += [decode(pipeline, each) for each in torch.split(latents, 1)]
            shares = None if sparse is None else sparse.shares()
            if shares is not None:
                setting.kept.append((shares.density, shares.mass))
        if sparse is not None and setting.cache is None:
            setting.errors = _velocity_errors(setting.transformer, points)
        yield name


@contextmanager
def _recorded(transformer: Any, points: list[Point], first_step: int) -> Iterator[None]:
    """Keep some inputs of passes from a step on, and their velocities, within the context."""
    passes = itertools.count(-2 * first_step)  # two passes a step, with guidance

    def keep(_: Any, __: Any, inputs: dict[str, Any], output: Any) -> None:
        number = next(passes)
        if number >= 0 and number % VELOCITY_EVERY == 0:
            points.append((dict(inputs), output[0].detach().clone()))

    handle = transformer.register_forward_hook(keep, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def _velocity_errors(transformer: Any, points: list[Point]) -> list[float]:
    """Return the error energy beside recorded velocities in percent, on average, by caption."""
    shares = []
    for inputs, reference in points:
        error = transformer(**inputs)[0].float() - reference.float()
        energy, whole = (each.square().flatten(1).sum(1) for each in (error, reference.float()))
        shares.append((100 * energy / whole).tolist())
    return [float(each) for each in np.mean(shares, axis=0)]


def _rows(
    name: str, setting: Setting, settings: dict[str, Setting], texts: list[str]
) -> Iterator[Row]:
    if setting.kept:
        density, mass = np.mean(setting.kept, axis=0).tolist()
        yield Row(f"{name}, density", density, "of all scores")
        yield Row(f"{name}, mass", mass, "of the softmax, measured")
    if setting.errors:
        low, high = bootstrap(np.array(setting.errors))
        error = float(np.mean(setting.errors))
        yield Row(f"{name}, velocity error", error, "% of its energy", low=low, high=high)
    if name != DENSE:
        pairs = zip(setting.videos, settings[DENSE].videos, strict=True)
        psnr = [psnr_db(video, dense) for video, dense in pairs]
        low, high = bootstrap(np.array(psnr))
        yield Row(f"{name}, mean PSNR", float(np.mean(psnr)), "dB", low=low, high=high)
        yield Row(f"{name}, lowest PSNR", min(psnr), f"dB, of {len(psnr)}")
    judged = [
        all(verdicts(video, parse_caption(text)).values())
        for video, text in zip(setting.videos, texts, strict=True)
    ]
    yield rate_row(f"{name}, shows all that was said", Rate(sum(judged), len(judged)))


if __name__ == "__main__":
    typer.run(main)
