"""Score the miniature in both modes on unseen captions: `python -m benchmarks.quality.miniature`.

The result has the oracle's rate of each attribute in bf16 and in w8a8 (same captions, same seeds),
their paired difference, the PSNR of w8a8 videos against the bf16 videos of the same captions, and
the PSNR of the VAE's reconstruction, all with 95 % confidence intervals. With `--sheet` it also
writes the contact sheet that is shipped in models/wan-mini.
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
CACHE_FOLDER = report.ROOT / "var" / "benchmarks"
RESAMPLES = 10_000
VAE_CLIPS = 64
AXIS = "relation's axis"


def main(
    count: Annotated[int, typer.Option(min=2, help="Evaluation captions.")] = 200,
    batch: Annotated[int, typer.Option(min=1, help="Videos at a time.")] = 10,
    device: str = "cpu",
    sheet: Annotated[bool, typer.Option(help="Replace the model's contact sheet.")] = False,
) -> None:
    """Score both modes and write the result."""
    texts = captions_of(Split.EVALUATION, count)
    pipeline = load_pipeline(MODEL, device)
    bf16 = generate_videos(pipeline, cache_path("bf16", device, texts), texts, batch)
    recipe = quant.QuantRecipe.load("boundary-hif8")
    scales = quant.load_scales(SCALES, model_folder=MODEL)
    fingerprint = quant.model_fingerprint(MODEL)
    quant.check_scales(scales, model_fingerprint=fingerprint, recipe=recipe)
    pipeline.transformer, converted = quant.quantize_transformer(
        pipeline.transformer, recipe, scales
    )
    print(str(converted).splitlines()[0])
    w8a8 = generate_videos(pipeline, cache_path("w8a8", device, texts), texts, batch)
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
    report.save(report.result("miniature", device, settings, rows))
    if sheet:
        write_sheets(bf16, w8a8, texts)
    for mode in ("bf16", "w8a8"):
        cache_path(mode, device, texts).unlink()


def cache_path(mode: str, device: str, texts: list[str]) -> Path:
    """Return the file that keeps an interrupted run's videos.

    Its name depends on everything that determines a video, except the code.
    """
    settings = [mode, device, quant.model_fingerprint(MODEL), SAMPLING_STEPS, GUIDANCE_SCALE, texts]
    if mode != "bf16":
        settings.append(hashlib.sha256(SCALES.read_bytes()).hexdigest())
    digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
    return CACHE_FOLDER / f"{mode}-{digest[:16]}.npz"


def generate_videos(
    pipeline: WanPipeline, path: Path, texts: list[str], batch: int
) -> list[Frames]:
    """Generate a video for each caption, except those that `path` already contains."""
    CACHE_FOLDER.mkdir(parents=True, exist_ok=True)
    videos: list[Frames] = list(np.load(path)["videos"]) if path.exists() else []
    while len(videos) < len(texts):
        part = range(len(videos), min(len(texts), len(videos) + batch))
        with quant.denoising_run(pipeline.transformer):
            videos += sample(pipeline, [texts[i] for i in part], list(part), batch=batch)
        np.savez_compressed(path, videos=np.stack(videos))
        print(f"{path.name}: {len(videos)} of {len(texts)}", flush=True)
    return videos


def judge(videos: list[Frames], texts: list[str]) -> list[dict[str, bool]]:
    """Return the oracle's verdicts on each video, and that on the axis of two things."""
    judged = []
    for video, text in zip(videos, texts, strict=True):
        scene, reading = parse_caption(text), read(video)
        verdicts = compare(reading, scene)
        if scene.relation is not None:
            is_horizontal = reading.relation in ("left", "right")
            expected = scene.relation == "left"
            verdicts[AXIS] = reading.relation is not None and is_horizontal == expected
        judged.append(verdicts)
    return judged


def rate_rows(bf16: list[dict[str, bool]], w8a8: list[dict[str, bool]]) -> list[report.Row]:
    """Return the rates of both modes and their paired difference for each attribute."""
    rows = []
    for name in (*ATTRIBUTES, AXIS):
        pairs = [(a[name], b[name]) for a, b in zip(bf16, w8a8, strict=True) if name in a]
        before, after = (Rate(sum(passed), len(pairs)) for passed in zip(*pairs, strict=True))
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
    """Return a rate with its Wilson interval."""
    low, high = rate.interval
    return report.Row(what, rate.share, f"of {rate.total}", low=low, high=high)


def psnr_row(bf16: list[Frames], w8a8: list[Frames]) -> report.Row:
    """Return the mean PSNR of w8a8 videos against the bf16 videos of the same captions."""
    values = np.array([psnr_db(a, b) for a, b in zip(bf16, w8a8, strict=True)])
    low, high = bootstrap(values)
    return report.Row(
        "w8a8 against bf16, mean PSNR", float(values.mean()), "dB", low=low, high=high
    )


def vae_rows(pipeline: WanPipeline, count: int) -> list[report.Row]:
    """Return the mean and the lowest PSNR of the VAE's reconstruction of evaluation clips."""
    values = reconstruction_psnr_db(pipeline.vae, Split.EVALUATION, count, seed=1).numpy()
    low, high = bootstrap(values)
    what = "VAE on full clips"
    return [
        report.Row(f"{what}, mean PSNR", float(values.mean()), "dB", low=low, high=high),
        report.Row(f"{what}, lowest PSNR", float(values.min()), f"dB, of {count}"),
    ]


def psnr_db(video: Frames, reference: Frames) -> float:
    """Return the PSNR over all frames, peak 255; capped at 100 dB for identical videos."""
    error = np.mean((video.astype(np.float64) - reference.astype(np.float64)) ** 2)
    return float(10 * np.log10(255.0**2 / max(float(error), 255.0**2 * 1e-10)))


def bootstrap(values: np.ndarray) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval of the mean."""
    rng = np.random.default_rng(0)
    means = values[rng.integers(0, len(values), (RESAMPLES, len(values)))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def write_sheets(bf16: list[Frames], w8a8: list[Frames], texts: list[str]) -> None:
    """Write a contact sheet of the first captions, unselected: bf16 left, w8a8 right."""
    rows = range(min(10, len(texts)))
    sheets = [
        contact_sheet(f"{mode}, frames 1, 5, 9, 13, 17", [(texts[i], videos[i]) for i in rows])
        for mode, videos in (("bf16", bf16), ("w8a8", w8a8))
    ]
    path: Path = MODEL / "contact-sheet.png"
    side_by_side(sheets).save(path, optimize=True)
    print(json.dumps({"contact_sheet": str(path.relative_to(report.ROOT))}))


if __name__ == "__main__":
    typer.run(main)
