"""The miniature in both modes on captions it never saw: `python -m benchmarks.quality.miniature`

Per attribute the oracle's rate in bf16 and in w8a8 (same captions, same seeds), the paired
difference, PSNR of each w8a8 video against its bf16 twin, and the VAE's own reconstruction. All
with 95 % confidence intervals. Writes the contact sheets that models/wan-mini ships.
"""

import hashlib
import json
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from diffusers import WanPipeline

import quant
from benchmarks import report
from mini.evaluate import (
    GUIDANCE_SCALE,
    SAMPLING_STEPS,
    Rate,
    contact_sheet,
    load_pipeline,
    sample,
    side_by_side,
)
from mini.training.train_vae import reconstruction_psnr_db
from mini.world.oracle import ATTRIBUTES, Frames, compare, read
from mini.world.scenes import Split, captions_of, parse_caption

MODEL = report.ROOT / "models" / "wan-mini"
SCALES = MODEL / "scales" / "boundary-hif8.safetensors"
KEPT = report.ROOT / "var" / "benchmarks"
RESAMPLES = 10_000
VAE_CLIPS = 64
AXIS = "relation's axis"


def main(
    count: Annotated[int, typer.Option(min=2, help="Evaluation captions.")] = 200,
    batch: Annotated[int, typer.Option(min=1, help="Videos at a time.")] = 10,
    device: str = "cpu",
    sheet: Annotated[bool, typer.Option(help="Replace the model's contact sheet.")] = False,
) -> None:
    """Score both modes and write the result and the contact sheets."""
    texts = captions_of(Split.EVALUATION, count)
    pipeline = load_pipeline(MODEL, device)
    bf16 = videos(pipeline, kept_under("bf16", device, texts), texts, batch)
    recipe = quant.QuantRecipe.load("boundary-hif8")
    scales = quant.load_scales(SCALES, model_folder=MODEL)
    fingerprint = quant.model_fingerprint(MODEL)
    quant.check_scales(scales, model_fingerprint=fingerprint, recipe=recipe)
    pipeline.transformer, converted = quant.quantize_transformer(
        pipeline.transformer, recipe, scales
    )
    print(str(converted).splitlines()[0])
    w8a8 = videos(pipeline, kept_under("w8a8", device, texts), texts, batch)
    rows = [
        *rate_rows(judge(bf16, texts), judge(w8a8, texts)),
        psnr_row(bf16, w8a8),
        *vae_rows(pipeline, min(count, VAE_CLIPS)),
    ]
    report.print_table(rows)
    settings = {
        "captions": count,
        "scenes": len({parse_caption(text).key for text in texts}),
        "vae_clips": min(count, VAE_CLIPS),
        "split": str(Split.EVALUATION),
        "steps": SAMPLING_STEPS,
        "guidance_scale": GUIDANCE_SCALE,
        "seeds": f"0..{count - 1}",
        "model": fingerprint,
        "recipe": recipe.fingerprint,
    }
    report.keep(report.result("miniature", device, settings, rows))
    if sheet:
        write_sheets(bf16, w8a8, texts)
    for mode in ("bf16", "w8a8"):
        kept_under(mode, device, texts).unlink()


def kept_under(mode: str, device: str, texts: list[str]) -> Path:
    """Where an interrupted run is kept; the name covers what decides a video but for the code."""
    settings = [mode, device, quant.model_fingerprint(MODEL), SAMPLING_STEPS, GUIDANCE_SCALE, texts]
    if mode != "bf16":
        settings.append(hashlib.sha256(SCALES.read_bytes()).hexdigest())
    digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
    return KEPT / f"{mode}-{digest[:16]}.npz"


def videos(pipeline: WanPipeline, path: Path, texts: list[str], batch: int) -> list[Frames]:
    """One video per caption; what `path` holds of them already is not made again."""
    KEPT.mkdir(parents=True, exist_ok=True)
    made: list[Frames] = list(np.load(path)["videos"]) if path.exists() else []
    while len(made) < len(texts):
        part = range(len(made), min(len(texts), len(made) + batch))
        made += sample(pipeline, [texts[i] for i in part], list(part), batch=batch)
        np.savez_compressed(path, videos=np.stack(made))
        print(f"{path.name}: {len(made)} of {len(texts)}", flush=True)
    return made


def judge(made: list[Frames], texts: list[str]) -> list[dict[str, bool]]:
    """Every video's verdicts, and whether two things lie along the axis that was said."""
    judged = []
    for video, text in zip(made, texts, strict=True):
        scene, reading = parse_caption(text), read(video)
        verdicts = compare(reading, scene)
        if scene.relation is not None:
            sideways = reading.relation in ("left", "right")
            said = scene.relation == "left"
            verdicts[AXIS] = reading.relation is not None and sideways == said
        judged.append(verdicts)
    return judged


def rate_rows(bf16: list[dict[str, bool]], w8a8: list[dict[str, bool]]) -> list[report.Row]:
    """Rates of both modes and their paired difference, per attribute."""
    rows = []
    for name in (*ATTRIBUTES, AXIS):
        pairs = [(a[name], b[name]) for a, b in zip(bf16, w8a8, strict=True) if name in a]
        before, after = (Rate(sum(shown), len(pairs)) for shown in zip(*pairs, strict=True))
        low, high = bootstrap(np.array([float(b) - float(a) for a, b in pairs]))
        rows += [
            rate_row(f"{name}, bf16", before),
            rate_row(f"{name}, w8a8", after),
            report.Row(
                f"{name}, w8a8 - bf16", after.share - before.share, "paired", low=low, high=high
            ),
        ]
    return rows


def rate_row(what: str, rate: Rate) -> report.Row:
    """A rate with its Wilson interval."""
    low, high = rate.interval
    return report.Row(what, rate.share, f"of {rate.total}", low=low, high=high)


def psnr_row(bf16: list[Frames], w8a8: list[Frames]) -> report.Row:
    """How far each w8a8 video is from its bf16 twin."""
    values = np.array([psnr_db(a, b) for a, b in zip(bf16, w8a8, strict=True)])
    low, high = bootstrap(values)
    return report.Row(
        "w8a8 against bf16, mean PSNR", float(values.mean()), "dB", low=low, high=high
    )


def vae_rows(pipeline: WanPipeline, count: int) -> list[report.Row]:
    """Reconstruction of full evaluation clips: the mean, and the worst of them."""
    values = reconstruction_psnr_db(pipeline.vae, Split.EVALUATION, count, seed=1).numpy()
    low, high = bootstrap(values)
    what = "VAE on full clips"
    return [
        report.Row(f"{what}, mean PSNR", float(values.mean()), "dB", low=low, high=high),
        report.Row(f"{what}, lowest PSNR", float(values.min()), f"dB, of {count}"),
    ]


def psnr_db(video: Frames, reference: Frames) -> float:
    """PSNR over all frames, peak 255; capped at 100 dB for identical videos."""
    error = np.mean((video.astype(np.float64) - reference.astype(np.float64)) ** 2)
    return float(10 * np.log10(255.0**2 / max(float(error), 255.0**2 * 1e-10)))


def bootstrap(values: np.ndarray) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean."""
    rng = np.random.default_rng(0)
    means = values[rng.integers(0, len(values), (RESAMPLES, len(values)))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def write_sheets(bf16: list[Frames], w8a8: list[Frames], texts: list[str]) -> None:
    """The first captions as they come, good or bad: bf16 left, w8a8 right."""
    shown = range(min(10, len(texts)))
    sheets = [
        contact_sheet(f"{mode}, frames 1, 5, 9, 13, 17", [(texts[i], made[i]) for i in shown])
        for mode, made in (("bf16", bf16), ("w8a8", w8a8))
    ]
    path: Path = MODEL / "contact-sheet.png"
    side_by_side(sheets).save(path, optimize=True)
    print(json.dumps({"contact_sheet": str(path.relative_to(report.ROOT))}))


if __name__ == "__main__":
    typer.run(main)
