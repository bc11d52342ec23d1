"""The miniature in both modes on captions it never saw: `python -m benchmarks.miniature`

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
    oracle_rates,
    sample,
    side_by_side,
)
from mini.oracle import ATTRIBUTES, Frames, verdicts
from mini.scenes import Split, captions_of, parse_caption
from mini.train_vae import reconstruction_psnr_db

MODEL = report.ROOT / "models" / "wan-mini"
SCALES = MODEL / "scales" / "boundary-hif8.safetensors"
KEPT = report.ROOT / "var" / "benchmarks"
RESAMPLES = 10_000
VAE_CLIPS = 64


def main(
    count: Annotated[int, typer.Option(min=2, help="Evaluation captions.")] = 200,
    batch: Annotated[int, typer.Option(min=1, help="Videos at a time.")] = 10,
    device: str = "cpu",
) -> None:
    """Score both modes and write the result and the contact sheets."""
    texts = captions_of(Split.EVALUATION, count)
    pipeline = load_pipeline(MODEL, device)
    bf16 = videos(pipeline, kept_under("bf16", texts), texts, batch)
    recipe = quant.QuantRecipe.load("boundary-hif8")
    scales = quant.load_scales(SCALES, model_folder=MODEL)
    fingerprint = quant.model_fingerprint(MODEL)
    quant.check_scales(scales, model_fingerprint=fingerprint, recipe=recipe)
    pipeline.transformer, converted = quant.quantize_transformer(
        pipeline.transformer, recipe, scales
    )
    print(str(converted).splitlines()[0])
    w8a8 = videos(pipeline, kept_under("w8a8", texts), texts, batch)
    rows = [
        *rate_rows(bf16, w8a8, texts),
        psnr_row(bf16, w8a8),
        vae_row(pipeline, min(count, VAE_CLIPS)),
    ]
    report.print_table(rows)
    settings = {
        "captions": count,
        "vae_clips": min(count, VAE_CLIPS),
        "split": str(Split.EVALUATION),
        "steps": SAMPLING_STEPS,
        "guidance_scale": GUIDANCE_SCALE,
        "seeds": f"0..{count - 1}",
        "model": fingerprint,
        "recipe": recipe.fingerprint,
    }
    report.keep(report.result("miniature", device, settings, rows))
    write_sheets(bf16, w8a8, texts)
    for mode in ("bf16", "w8a8"):
        kept_under(mode, texts).unlink()


def kept_under(mode: str, texts: list[str]) -> Path:
    """Where an interrupted run is kept: the name covers whatever decides a video."""
    settings = [mode, quant.model_fingerprint(MODEL), SAMPLING_STEPS, GUIDANCE_SCALE, texts]
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


def rate_rows(bf16: list[Frames], w8a8: list[Frames], texts: list[str]) -> list[report.Row]:
    """Rates of both modes and their paired difference, per attribute."""
    rows = []
    baseline, candidate = oracle_rates(bf16, texts), oracle_rates(w8a8, texts)
    for name in ATTRIBUTES:
        for mode, rate in (("bf16", baseline[name]), ("w8a8", candidate[name])):
            rows.append(rate_row(f"{name}, {mode}", rate))
        low, high = paired_interval(bf16, w8a8, texts, name)
        difference = candidate[name].share - baseline[name].share
        rows.append(report.Row(f"{name}, w8a8 - bf16", difference, "paired", low=low, high=high))
    return rows


def rate_row(what: str, rate: Rate) -> report.Row:
    """A rate with its Wilson interval."""
    low, high = rate.interval
    return report.Row(what, rate.share, f"of {rate.total}", low=low, high=high)


def paired_interval(
    bf16: list[Frames], w8a8: list[Frames], texts: list[str], attribute: str
) -> tuple[float, float]:
    """Bootstrap interval of the mean paired difference over captions."""
    differences = []
    for before, after, text in zip(bf16, w8a8, texts, strict=True):
        scene = parse_caption(text)
        seen = verdicts(before, scene)
        if attribute in seen:
            differences.append(int(verdicts(after, scene)[attribute]) - int(seen[attribute]))
    return bootstrap(np.array(differences, dtype=np.float64))


def psnr_row(bf16: list[Frames], w8a8: list[Frames]) -> report.Row:
    """How far each w8a8 video is from its bf16 twin."""
    values = np.array([psnr_db(a, b) for a, b in zip(bf16, w8a8, strict=True)])
    low, high = bootstrap(values)
    return report.Row(
        "w8a8 against bf16, mean PSNR", float(values.mean()), "dB", low=low, high=high
    )


def vae_row(pipeline: WanPipeline, count: int) -> report.Row:
    """Reconstruction of full evaluation clips."""
    values = reconstruction_psnr_db(pipeline.vae, Split.EVALUATION, count, seed=1).numpy()
    low, high = bootstrap(values)
    return report.Row(
        "VAE on full clips, mean PSNR", float(values.mean()), "dB", low=low, high=high
    )


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
