"""Measure the quality cost of FP8 attention: `python -m benchmarks.quality.fp8_attention`.

The miniature generates videos of unseen captions with the same seeds in bf16, w8a8 and w8a8 with
FP8 attention. By default all modes use the bit-true emulation (`quant.kernels.eager`), which rounds
queries, keys, values and the numerators of the softmax as FlashAttention-3 does. With
`--kernels device` the quantized modes run on the device's own kernels. The result has the oracle's
rate of each attribute, and the PSNR between modes, with 95 % confidence intervals. `--modes` takes
others of `RECIPES`: `--modes bf16,w8a8,int8` is what INT8 costs. `--bf16-steps 0,2` measures FP8
attention once for each number of first steps in which it stays in BF16. The result is written after
each mode.
"""

import hashlib
import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import typer
from diffusers import WanTransformer3DModel

import quant
from benchmarks import report
from benchmarks.fixtures.fused_transformer import fused_transformer
from benchmarks.quality.miniature import (
    AXIS,
    CACHE_FOLDER,
    MODEL,
    bootstrap,
    generate_videos,
    judge,
    psnr_db,
    rate_row,
)
from mini.evaluate import (
    GUIDANCE_SCALE,
    SAMPLING_STEPS,
    Rate,
    contact_sheet,
    load_pipeline,
    side_by_side,
)
from mini.world.oracle import ATTRIBUTES, Frames
from mini.world.scenes import Split, captions_of
from quant.kernels.eager import EagerKernels
from quant.kernels.interface import Kernels
from quant.kernels.selection import pick_kernels

RECIPES = {
    "bf16": None,
    "w8a8": "boundary-hif8",
    "w8a8-fp8attn": "boundary-hif8-fp8attn",
    "int8": "boundary-int8",
}
DEFAULT_MODES = "bf16,w8a8,w8a8-fp8attn"
REFERENCES = ("bf16", "w8a8")
"""What the modes after them are compared with."""


def main(  # noqa: PLR0913, PLR0917 (typer derives the command line from it)
    count: Annotated[int, typer.Option(min=2, help="Evaluation captions.")] = 24,
    batch: Annotated[int, typer.Option(min=1, help="Videos at a time.")] = 8,
    device: str = "cpu",
    kernels: Annotated[
        Literal["eager", "device"], typer.Option(help="What the quantized modes run on.")
    ] = "eager",
    sheet: Annotated[Path | None, typer.Option(help="Write a contact sheet here.")] = None,
    modes: Annotated[str, typer.Option(help=f"Of {', '.join(RECIPES)}.")] = DEFAULT_MODES,
    bf16_steps: Annotated[
        str, typer.Option(help="Numbers of first steps in BF16; the recipe's if empty.")
    ] = "",
) -> None:
    """Score the modes and write the result."""
    texts = captions_of(Split.EVALUATION, count)
    if unknown := set(modes.split(",")) - RECIPES.keys():
        raise typer.BadParameter(f"{min(unknown)!r} is not one of {', '.join(RECIPES)}")
    recipes = chosen_recipes(modes, bf16_steps)
    found = {recipe and recipe.name: pick(recipe, kernels, device) for recipe in recipes.values()}
    picked = {mode: found[recipe and recipe.name] for mode, recipe in recipes.items()}
    settings = {
        "captions": count,
        "batch": batch,
        "split": str(Split.EVALUATION),
        "steps": SAMPLING_STEPS,
        "guidance_scale": GUIDANCE_SCALE,
        "seeds": f"0..{count - 1}",
        "model": quant.model_fingerprint(MODEL),
        "recipes": {mode: each.fingerprint for mode, each in recipes.items() if each},
        "kernels": {mode: each.name for mode, each in picked.items()},
    }
    where = device if device == "cpu" else torch.cuda.get_device_name(0)
    name = "attention-quality" if modes == DEFAULT_MODES else f"quality-{modes.replace(',', '-')}"
    name += "-first-steps" if bf16_steps else ""
    videos: dict[str, list[Frames]] = {}
    rows: list[report.Row] = []
    for mode, recipe in recipes.items():
        videos[mode] = mode_videos(recipe, texts, batch, device, picked[mode])
        rows = [*rate_rows(videos, texts), *psnr_rows(videos)]
        report.log_rows(row for row in rows if row.what.startswith(f"{mode} against"))
        # After each mode, so that a run that is stopped leaves what it has measured.
        report.save(report.result(name, where, settings, rows))
    report.print_table(rows)
    if sheet is not None:
        write_sheet(videos, texts, sheet)
    for mode, recipe in recipes.items():
        cache_path(recipe, device, picked[mode], texts, batch).unlink()


def chosen_recipes(modes: str, bf16_steps: str) -> dict[str, quant.QuantRecipe | None]:
    """Return the recipe of each mode, and with FP8 attention one for each number of steps."""
    found: dict[str, quant.QuantRecipe | None] = {}
    for mode in modes.split(","):
        recipe = load_recipe(mode)
        if recipe is None or recipe.attention != "fp8" or not bf16_steps:
            found[mode] = recipe
            continue
        for steps in bf16_steps.split(","):
            if not steps.isdecimal():
                raise typer.BadParameter(f"--bf16-steps has {steps!r}: give numbers with commas")
            changed = replace(recipe, attention_bf16_steps=int(steps))
            found[f"{mode}, {steps} steps in BF16"] = changed
    return found


def load_recipe(mode: str) -> quant.QuantRecipe | None:
    """Return the shipped recipe of one of `RECIPES`; None for BF16."""
    name = RECIPES[mode]
    return quant.QuantRecipe.load(name) if name else None


def pick(
    recipe: quant.QuantRecipe | None, kernels: Literal["eager", "device"], device: str
) -> Kernels:
    """Return the kernels of a mode; bf16, which the others are compared with, is always eager."""
    if kernels == "eager" or recipe is None:
        return EagerKernels()
    choice = pick_kernels(
        torch.device(device),
        quantized=recipe.format == "hif8",
        fp8_attention=recipe.attention == "fp8",
        int8=recipe.format == "int8",
    )
    if choice.warning is not None:
        raise SystemExit(choice.warning)
    return choice.kernels


def mode_videos(
    recipe: quant.QuantRecipe | None,
    texts: list[str],
    batch: int,
    device: str,
    kernels: Kernels,
) -> list[Frames]:
    """Generate the videos of one mode; continues an interrupted run."""
    pipeline = load_pipeline(MODEL, device)
    pipeline.transformer = prepare(pipeline.transformer, recipe, kernels)
    kept = cache_path(recipe, device, kernels, texts, batch)
    return generate_videos(pipeline, kept, texts, batch)


def prepare(
    transformer: WanTransformer3DModel, recipe: quant.QuantRecipe | None, kernels: Kernels
) -> WanTransformer3DModel:
    """Return a transformer of the miniature on the given kernels, in BF16 or a shipped recipe."""
    if recipe is None:
        return fused_transformer(transformer, kernels)
    scales = quant.load_scales(scales_file(recipe), model_folder=MODEL, recipe=recipe)
    quant.check_scales(scales, model_fingerprint=quant.model_fingerprint(MODEL), recipe=recipe)
    return fused_transformer(transformer, kernels, recipe, scales)


def scales_file(recipe: quant.QuantRecipe) -> Path:
    """Return the file of the miniature's scales for a shipped recipe."""
    return MODEL / "scales" / f"{recipe.name}.safetensors"


def cache_path(
    recipe: quant.QuantRecipe | None, device: str, kernels: Kernels, texts: list[str], batch: int
) -> Path:
    """Return the file that keeps an interrupted run's videos.

    Its name depends on everything that determines a video, except the code.
    """
    name, scales, fingerprints = "bf16", b"", [quant.model_fingerprint(MODEL)]
    if recipe is not None:
        name, scales = recipe.name, scales_file(recipe).read_bytes()
        fingerprints.append(recipe.fingerprint)
    settings = [fingerprints, SAMPLING_STEPS, GUIDANCE_SCALE, kernels.name, texts, batch]
    digest = hashlib.sha256(json.dumps(settings).encode() + scales).hexdigest()
    return CACHE_FOLDER / f"attention-quality-{name}-{device}-{digest[:16]}.npz"


def rate_rows(videos: dict[str, list[Frames]], texts: list[str]) -> list[report.Row]:
    """Return the rate of each attribute in each mode."""
    judged = {mode: judge(each, texts) for mode, each in videos.items()}
    rows = []
    for name in (*ATTRIBUTES, AXIS):
        for mode, verdicts in judged.items():
            passed = [each[name] for each in verdicts if name in each]
            rows.append(rate_row(f"{name}, {mode}", Rate(sum(passed), len(passed))))
    return rows


def psnr_rows(videos: dict[str, list[Frames]]) -> list[report.Row]:
    """Return the mean and the lowest PSNR of each mode against those before it in `REFERENCES`."""
    rows = []
    for mode, other in itertools.product(videos, REFERENCES):
        if other not in videos or mode in REFERENCES[: REFERENCES.index(other) + 1]:
            continue
        values = np.array([psnr_db(a, b) for a, b in zip(videos[mode], videos[other], strict=True)])
        low, high = bootstrap(values)
        what = f"{mode} against {other}"
        rows += [
            report.Row(f"{what}, mean PSNR", float(values.mean()), "dB", low=low, high=high),
            report.Row(f"{what}, lowest PSNR", float(values.min()), f"dB, of {len(values)}"),
        ]
    return rows


def write_sheet(videos: dict[str, list[Frames]], texts: list[str], path: Path) -> None:
    """Write a contact sheet of the first captions, with a column for each mode."""
    rows = range(min(8, len(texts)))
    sheets = [
        contact_sheet(f"{mode}, frames 1, 5, 9, 13, 17", [(texts[i], each[i]) for i in rows])
        for mode, each in videos.items()
    ]
    side_by_side(sheets).save(path, optimize=True)


if __name__ == "__main__":
    typer.run(main)
