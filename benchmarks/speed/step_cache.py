"""Measure what step caches save and cost: `python -m benchmarks.speed.step_cache`.

The miniature generates videos of unseen captions in w8a8, one at a time as a worker does: without a
cache, with diffusers' first-block cache and with its MagCache, each with several thresholds. For
each setting the result has the share of forward passes whose blocks were skipped, the seconds of
denoising against those without a cache (CPU time, so that other work on the machine counts little),
the PSNR against the videos without a cache, and the share of videos that match their whole caption.
MagCache's ratios are measured first, on calibration captions; the last line on stdout has them, for
`mag_ratios`.
"""

import json
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from typing import Annotated

import numpy as np
import torch
import typer
from diffusers import WanPipeline
from diffusers.hooks import MagCacheConfig

import quant
from benchmarks import report
from benchmarks.fixtures.fused_transformer import fused_transformer
from benchmarks.quality.miniature import MODEL, bootstrap, psnr_db, rate_row
from mini.architecture import HEIGHT_PX, NUM_FRAMES, TEXT_TOKENS, WIDTH_PX
from mini.evaluate import GUIDANCE_SCALE, SAMPLING_STEPS, Rate, load_pipeline, noise
from mini.world.oracle import Frames, verdicts
from mini.world.scenes import Split, captions_of, parse_caption
from quant.kernels.eager import EagerKernels
from worker.config import FirstBlockCache, MagCache, StepCache
from worker.engine.step_cache import register_fused_blocks, step_cache
from worker.engine.vae_decoder import decode_chunks, denormalize, to_frames

RECIPE = "boundary-hif8"
BASELINE = "no cache"
FIRST_BLOCK_THRESHOLDS = (0.05, 0.1, 0.2)
MAG_THRESHOLDS = (0.06, 0.12, 0.24)
PASSES = 2 * SAMPLING_STEPS  # with the prompt and with the negative prompt


@dataclass(slots=True)
class SettingResult:
    """The result of one setting: for each caption the video, CPU seconds, and full passes."""

    videos: list[Frames] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    full_passes: list[int] = field(default_factory=list)


def main(
    count: Annotated[int, typer.Option(min=2, help="Evaluation captions.")] = 8,
    calibration: Annotated[int, typer.Option(min=1, help="Captions for MagCache's ratios.")] = 4,
) -> None:
    """Measure every setting and write the result."""
    pipeline = w8a8_pipeline()
    ratios = measure_ratios(pipeline, captions_of(Split.CALIBRATION, calibration))
    texts = captions_of(Split.EVALUATION, count)
    results = generate(pipeline, texts, {BASELINE: None} | settings(ratios))
    rows = [row for name in results for row in setting_rows(name, results, texts)]
    report.print_table(rows)
    document = {
        "captions": count,
        "calibration_captions": calibration,
        "split": str(Split.EVALUATION),
        "steps": SAMPLING_STEPS,
        "guidance_scale": GUIDANCE_SCALE,
        "model": quant.model_fingerprint(MODEL),
        "recipe": quant.QuantRecipe.load(RECIPE).fingerprint,
        "mag_ratios": list(ratios),
    }
    report.save(report.result("step-cache", "cpu", document, rows))
    print(json.dumps({"mag_ratios": ratios}))


def w8a8_pipeline() -> WanPipeline:
    """Load the miniature in w8a8 with fused blocks."""
    pipeline = load_pipeline(MODEL, "cpu")
    recipe = quant.QuantRecipe.load(RECIPE)
    scales = quant.load_scales(MODEL / "scales" / f"{RECIPE}.safetensors", recipe=recipe)
    quant.check_scales(scales, model_fingerprint=quant.model_fingerprint(MODEL), recipe=recipe)
    pipeline.transformer = fused_transformer(pipeline.transformer, EagerKernels(), recipe, scales)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def settings(ratios: tuple[float, ...]) -> dict[str, StepCache]:
    """Return the caches that are compared, by name."""
    first_block: dict[str, StepCache] = {
        f"first_block {each}": FirstBlockCache(method="first_block", threshold=each)
        for each in FIRST_BLOCK_THRESHOLDS
    }
    return first_block | {
        f"mag {each}": MagCache(method="mag", threshold=each, mag_ratios=ratios)
        for each in MAG_THRESHOLDS
    }


def measure_ratios(
    pipeline: WanPipeline, texts: list[str], batch: int = 1, steps: int = SAMPLING_STEPS
) -> tuple[float, ...]:
    """Measure MagCache's ratios with diffusers' calibration, which prints them for each pass."""
    register_fused_blocks()
    config = MagCacheConfig(calibrate=True, num_inference_steps=steps)
    starts = range(0, len(texts), batch)
    pipeline.transformer.enable_cache(config)
    printed = StringIO()
    try:
        with redirect_stdout(printed):
            for start in starts:
                together = texts[start : start + batch]
                denoise(pipeline, together, range(start, start + len(together)), steps)
    finally:
        pipeline.transformer.disable_cache()
    found = [json.loads(each) for each in re.findall(r"^\[[\d.].*\]$", printed.getvalue(), re.M)]
    if len(found) != 2 * len(starts):
        raise RuntimeError(f"diffusers printed {len(found)} calibrations of {2 * len(starts)}")
    return tuple(round(each, 5) for each in np.mean(found, axis=0).tolist())


def generate(
    pipeline: WanPipeline, texts: list[str], compared: dict[str, StepCache | None]
) -> dict[str, SettingResult]:
    """Generate a video for every caption in every setting; the settings take turns."""
    results = {name: SettingResult() for name in compared}
    for seed, text in enumerate(texts):
        for name, setting in compared.items():
            with count_full_passes(pipeline) as calls:
                started = time.process_time()
                with step_cache(pipeline.transformer, setting, SAMPLING_STEPS):
                    latents = denoise(pipeline, [text], [seed])
                results[name].seconds.append(time.process_time() - started)
            results[name].full_passes.append(len(calls))
            results[name].videos.append(decode(pipeline, latents))
        print(f"caption {seed + 1} of {len(texts)}: done", flush=True)
    return results


@torch.no_grad()
def denoise(
    pipeline: WanPipeline, texts: Sequence[str], seeds: Sequence[int], steps: int = SAMPLING_STEPS
) -> torch.Tensor:
    """Generate the latents of a batch of videos, including the text encoder."""
    latents: torch.Tensor = pipeline(
        prompt=list(texts),
        negative_prompt=[""] * len(texts),
        latents=noise(seeds, pipeline),
        height=HEIGHT_PX,
        width=WIDTH_PX,
        num_frames=NUM_FRAMES,
        num_inference_steps=steps,
        guidance_scale=GUIDANCE_SCALE,
        max_sequence_length=TEXT_TOKENS,
        output_type="latent",
    ).frames
    return latents


@torch.no_grad()
def decode(pipeline: WanPipeline, latents: torch.Tensor) -> Frames:
    """Decode latents to frames, [F, H, W, 3] uint8."""
    chunks = decode_chunks(pipeline.vae, denormalize(pipeline.vae, latents.float()))
    return np.concatenate([np.stack(list(to_frames(chunk))) for chunk in chunks])


@contextmanager
def count_full_passes(pipeline: WanPipeline) -> Iterator[list[int]]:
    """Count the passes that ran the last block; yields a list with one entry for each."""
    calls: list[int] = []
    handle = pipeline.transformer.blocks[-1].qkv.register_forward_hook(lambda *_: calls.append(1))
    try:
        yield calls
    finally:
        handle.remove()


def setting_rows(
    name: str, results: dict[str, SettingResult], texts: list[str]
) -> list[report.Row]:
    """Return the rows of one setting: skipped passes, time and quality."""
    result, without = results[name], results[BASELINE]
    psnr = [psnr_db(a, b) for a, b in zip(result.videos, without.videos, strict=True)]
    low, high = bootstrap(np.array(psnr))
    judged = [
        all(verdicts(video, parse_caption(text)).values())
        for video, text in zip(result.videos, texts, strict=True)
    ]
    skipped = 1 - sum(result.full_passes) / (PASSES * len(texts))
    seconds, baseline = (float(np.median(each.seconds)) for each in (result, without))
    rows = [
        report.Row(f"{name}, passes left out", skipped, "share"),
        report.Row(f"{name}, denoising, median CPU time", seconds, "s", baseline=baseline),
        rate_row(f"{name}, shows all that was said", Rate(sum(judged), len(judged))),
    ]
    if result is not without:
        rows += [
            report.Row(f"{name}, mean PSNR", float(np.mean(psnr)), "dB", low=low, high=high),
            report.Row(f"{name}, lowest PSNR", min(psnr), f"dB, of {len(psnr)}"),
        ]
    return rows


if __name__ == "__main__":
    typer.run(main)
