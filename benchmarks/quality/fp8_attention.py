"""Measure the quality cost of FP8 attention: `python -m benchmarks.quality.fp8_attention`.

The miniature generates videos of unseen captions with the same seeds in bf16, w8a8 and w8a8 with
FP8 attention. By default all modes use the bit-true emulation (`quant.kernels.eager`), which rounds
queries, keys, values and the numerators of the softmax as FlashAttention-3 does. With
`--kernels device` the quantized modes run on the device's own kernels. The result has the oracle's
rate of each attribute, and the PSNR between modes, with 95 % confidence intervals. `--modes` takes
others of `RECIPES`: `--modes bf16,w8a8,int8` is what INT8 costs.
"""

import hashlib
import json
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
PAIRS = (
    ("w8a8", "bf16"),
    ("w8a8-fp8attn", "bf16"),
    ("w8a8-fp8attn", "w8a8"),
    ("int8", "bf16"),
    ("int8", "w8a8"),
)


def main(
    count: Annotated[int, typer.Option(min=2, help="Evaluation captions.")] = 24,
    batch: Annotated[int, typer.Option(min=1, help="Videos at a time.")] = 8,
    device: str = "cpu",
    kernels: Annotated[
        Literal["eager", "device"], typer.Option(help="What the quantized modes run on.")
    ] = "eager",
    sheet: Annotated[Path | None, typer.Option(help="Write a contact sheet here.")] = None,
    modes: Annotated[str, typer.Option(help=f"Of {', '.join(RECIPES)}.")] = DEFAULT_MODES,
) -> None:
    """Score the modes and write the result."""
    texts = captions_of(Split.EVALUATION, count)
    chosen = modes.split(",")
    if unknown := set(chosen) - RECIPES.keys():
        raise typer.BadParameter(f"{min(unknown)!r} is not one of {', '.join(RECIPES)}")
    picked = {mode: pick(mode, kernels, device) for mode in chosen}
    videos = {mode: mode_videos(mode, texts, batch, device, picked[mode]) for mode in chosen}
    rows = [*rate_rows(videos, texts), *psnr_rows(videos)]
    report.print_table(rows)
    settings = {
        "captions": count,
        "split": str(Split.EVALUATION),
        "steps": SAMPLING_STEPS,
        "guidance_scale": GUIDANCE_SCALE,
        "seeds": f"0..{count - 1}",
        "model": quant.model_fingerprint(MODEL),
        "recipes": {
            mode: quant.QuantRecipe.load(name).fingerprint
            for mode, name in RECIPES.items()
            if name and mode in chosen
        },
        "kernels": {mode: each.name for mode, each in picked.items()},
    }
    where = device if device == "cpu" else torch.cuda.get_device_name(0)
    name = "attention-quality" if modes == DEFAULT_MODES else f"quality-{modes.replace(',', '-')}"
    report.save(report.result(name, where, settings, rows))
    if sheet is not None:
        write_sheet(videos, texts, sheet)
    for mode in chosen:
        cache_path(mode, device, picked[mode], texts).unlink()


def pick(mode: str, kernels: Literal["eager", "device"], device: str) -> Kernels:
    """Return the kernels of a mode; bf16, which the others are compared with, is always eager."""
    if kernels == "eager" or RECIPES[mode] is None:
        return EagerKernels()
    choice = pick_kernels(
        torch.device(device),
        quantized=mode != "int8",
        fp8_attention=mode == "w8a8-fp8attn",
        int8=mode == "int8",
    )
    if choice.warning is not None:
        raise SystemExit(choice.warning)
    return choice.kernels


def mode_videos(
    mode: str, texts: list[str], batch: int, device: str, kernels: Kernels
) -> list[Frames]:
    """Generate the videos of one mode; continues an interrupted run."""
    pipeline = load_pipeline(MODEL, device)
    pipeline.transformer = prepare(pipeline.transformer, RECIPES[mode], kernels)
    return generate_videos(pipeline, cache_path(mode, device, kernels, texts), texts, batch)


def prepare(
    transformer: WanTransformer3DModel, name: str | None, kernels: Kernels
) -> WanTransformer3DModel:
    """Return a transformer of the miniature on the given kernels, in BF16 or a shipped recipe."""
    if name is None:
        return fused_transformer(transformer, kernels)
    recipe = quant.QuantRecipe.load(name)
    scales = quant.load_scales(scales_file(name), model_folder=MODEL, recipe=recipe)
    quant.check_scales(scales, model_fingerprint=quant.model_fingerprint(MODEL), recipe=recipe)
    return fused_transformer(transformer, kernels, recipe, scales)


def scales_file(recipe: str) -> Path:
    """Return the file of the miniature's scales for a shipped recipe."""
    return MODEL / "scales" / f"{recipe}.safetensors"


def cache_path(mode: str, device: str, kernels: Kernels, texts: list[str]) -> Path:
    """Return the file that keeps an interrupted run's videos.

    Its name depends on everything that determines a video, except the code.
    """
    recipe = RECIPES[mode]
    scales = scales_file(recipe).read_bytes() if recipe else b""
    fingerprint = quant.model_fingerprint(MODEL)
    settings = [fingerprint, SAMPLING_STEPS, GUIDANCE_SCALE, kernels.name, texts]
    digest = hashlib.sha256(json.dumps(settings).encode() + scales).hexdigest()
    return CACHE_FOLDER / f"attention-quality-{mode}-{device}-{digest[:16]}.npz"


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
    """Return the mean and the lowest PSNR of each mode against another."""
    rows = []
    for mode, other in PAIRS:
        if not {mode, other} <= videos.keys():
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
