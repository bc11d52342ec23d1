"""What FP8 attention costs in quality: `python -m benchmarks.quality.fp8_attention`

The miniature on captions it never saw, same captions and seeds in bf16, w8a8 and w8a8 with FP8
attention, all by bit-true emulation (`quant.kernels.eager`): queries, keys, values, the softmax's
numerators and what comes out are rounded as the FP8 kernels round them. Per attribute the oracle's
rate, and PSNR between the modes, with 95 % confidence intervals.
"""

import hashlib
import json
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from diffusers import WanTransformer3DModel

import quant
from benchmarks import report
from benchmarks.quality.miniature import (
    AXIS,
    KEPT,
    MODEL,
    bootstrap,
    judge,
    psnr_db,
    rate_row,
    videos,
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

RECIPES = {"bf16": None, "w8a8": "boundary-hif8", "w8a8-fp8attn": "boundary-hif8-fp8attn"}
PAIRS = (("w8a8", "bf16"), ("w8a8-fp8attn", "bf16"), ("w8a8-fp8attn", "w8a8"))


def main(
    count: Annotated[int, typer.Option(min=2, help="Evaluation captions.")] = 24,
    batch: Annotated[int, typer.Option(min=1, help="Videos at a time.")] = 8,
    device: str = "cpu",
    sheet: Annotated[Path | None, typer.Option(help="Write a contact sheet here.")] = None,
) -> None:
    """Score the three modes and write the result."""
    texts = captions_of(Split.EVALUATION, count)
    made = {mode: mode_videos(mode, texts, batch, device) for mode in RECIPES}
    rows = [*rate_rows(made, texts), *psnr_rows(made)]
    report.print_table(rows)
    settings = {
        "captions": count,
        "split": str(Split.EVALUATION),
        "steps": SAMPLING_STEPS,
        "guidance_scale": GUIDANCE_SCALE,
        "seeds": f"0..{count - 1}",
        "model": quant.model_fingerprint(MODEL),
        "recipes": {
            mode: quant.QuantRecipe.load(name).fingerprint for mode, name in RECIPES.items() if name
        },
        "kernels": "eager",
    }
    name = device if device == "cpu" else torch.cuda.get_device_name(0)
    report.keep(report.result("attention-quality", name, settings, rows))
    if sheet is not None:
        write_sheet(made, texts, sheet)
    for mode in RECIPES:
        kept_under(mode, device, texts).unlink()


def mode_videos(mode: str, texts: list[str], batch: int, device: str) -> list[Frames]:
    """The videos of one mode; an interrupted run goes on where it was."""
    pipeline = load_pipeline(MODEL, device)
    pipeline.transformer = prepared(pipeline.transformer, RECIPES[mode], EagerKernels())
    return videos(pipeline, kept_under(mode, device, texts), texts, batch)


def prepared(
    transformer: WanTransformer3DModel, name: str | None, kernels: Kernels
) -> WanTransformer3DModel:
    """A transformer of the miniature under a shipped recipe, or in BF16, on some kernels."""
    if name is None:
        return quant.prepare_transformer(transformer, kernels).transformer
    recipe = quant.QuantRecipe.load(name)
    scales = quant.load_scales(scales_file(name), model_folder=MODEL, recipe=recipe)
    quant.check_scales(scales, model_fingerprint=quant.model_fingerprint(MODEL), recipe=recipe)
    return quant.prepare_transformer(transformer, kernels, recipe, scales).transformer


def scales_file(recipe: str) -> Path:
    """The miniature's scales for a shipped recipe."""
    return MODEL / "scales" / f"{recipe}.safetensors"


def kept_under(mode: str, device: str, texts: list[str]) -> Path:
    """Where an interrupted run is kept; the name covers what decides a video but for the code."""
    recipe = RECIPES[mode]
    scales = scales_file(recipe).read_bytes() if recipe else b""
    settings = [quant.model_fingerprint(MODEL), SAMPLING_STEPS, GUIDANCE_SCALE, texts]
    digest = hashlib.sha256(json.dumps(settings).encode() + scales).hexdigest()
    return KEPT / f"attention-quality-{mode}-{device}-{digest[:16]}.npz"


def rate_rows(made: dict[str, list[Frames]], texts: list[str]) -> list[report.Row]:
    """Per attribute the rate of each mode, beside that of bf16."""
    judged = {mode: judge(videos, texts) for mode, videos in made.items()}
    rows = []
    for name in (*ATTRIBUTES, AXIS):
        for mode, verdicts in judged.items():
            shown = [each[name] for each in verdicts if name in each]
            rows.append(rate_row(f"{name}, {mode}", Rate(sum(shown), len(shown))))
    return rows


def psnr_rows(made: dict[str, list[Frames]]) -> list[report.Row]:
    """How far the videos of one mode are from those of another: the mean, and the farthest."""
    rows = []
    for mode, other in PAIRS:
        values = np.array([psnr_db(a, b) for a, b in zip(made[mode], made[other], strict=True)])
        low, high = bootstrap(values)
        what = f"{mode} against {other}"
        rows += [
            report.Row(f"{what}, mean PSNR", float(values.mean()), "dB", low=low, high=high),
            report.Row(f"{what}, lowest PSNR", float(values.min()), f"dB, of {len(values)}"),
        ]
    return rows


def write_sheet(made: dict[str, list[Frames]], texts: list[str], path: Path) -> None:
    """The first captions as they come, a column for each mode."""
    shown = range(min(8, len(texts)))
    sheets = [
        contact_sheet(f"{mode}, frames 1, 5, 9, 13, 17", [(texts[i], videos[i]) for i in shown])
        for mode, videos in made.items()
    ]
    side_by_side(sheets).save(path, optimize=True)


if __name__ == "__main__":
    typer.run(main)
