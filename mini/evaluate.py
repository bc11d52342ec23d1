"""Evaluate whether the miniature's videos match their captions.

It samples videos, computes oracle rates with confidence intervals, and draws contact sheets.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import WanPipeline
from PIL import Image, ImageDraw, ImageFont

from mini.architecture import HEIGHT_PX, NUM_FRAMES, TEXT_TOKENS, WIDTH_PX
from mini.world.oracle import ATTRIBUTES, Frames, verdicts
from mini.world.scenes import parse_caption

SAMPLING_STEPS, GUIDANCE_SCALE = 20, 4.0
SHEET_PAPER, SHEET_INK = "#fafafa", "#202020"


def load_pipeline(folder: Path, device: str) -> WanPipeline:
    """Load a stored miniature as the worker runs it: in BF16, with the VAE in FP32."""
    pipeline = WanPipeline.from_pretrained(folder, dtype=torch.bfloat16)
    pipeline.vae.float()
    return pipeline.to(device)


def noise(seeds: Sequence[int], pipeline: WanPipeline) -> torch.Tensor:
    """Draw initial latents with a CPU generator per seed, equal for every device and batch size."""
    channels = pipeline.transformer.config.in_channels
    shape = (channels, 1 + (NUM_FRAMES - 1) // 4, HEIGHT_PX // 8, WIDTH_PX // 8)
    drawn = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(drawn).to(pipeline.transformer.device)


def sample(
    pipeline: WanPipeline,
    texts: Sequence[str],
    seeds: Sequence[int],
    batch: int = 25,
    steps: int = SAMPLING_STEPS,
    guidance_scale: float = GUIDANCE_SCALE,
) -> Iterator[Frames]:
    """Generate one video per text: [F, H, W, 3] uint8."""
    pipeline.set_progress_bar_config(disable=True)
    for start in range(0, len(texts), batch):
        result = pipeline(
            prompt=list(texts[start : start + batch]),
            negative_prompt=[""] * len(texts[start : start + batch]),
            latents=noise(seeds[start : start + batch], pipeline),
            height=HEIGHT_PX,
            width=WIDTH_PX,
            num_frames=NUM_FRAMES,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            max_sequence_length=TEXT_TOKENS,
            output_type="np",
        )
        yield from np.round(result.frames * 255).astype(np.uint8)


@dataclass(frozen=True, slots=True)
class Rate:
    """A success rate with its 95 % Wilson interval."""

    right: int
    total: int

    @property
    def share(self) -> float:
        """Return successes divided by trials; NaN without trials."""
        return self.right / self.total if self.total else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Return the lower and upper end of the 95 % Wilson score interval."""
        if not self.total:
            return (0.0, 1.0)
        z, n, p = 1.96, self.total, self.share
        centre = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
        return (max(0.0, centre - half), min(1.0, centre + half))


def oracle_rates(videos: Sequence[Frames], texts: Sequence[str]) -> dict[str, Rate]:
    """Count, for each attribute, the videos that match their caption."""
    judged = [
        verdicts(video, parse_caption(text)) for video, text in zip(videos, texts, strict=True)
    ]
    return {
        name: Rate(sum(v[name] for v in judged if name in v), sum(name in v for v in judged))
        for name in ATTRIBUTES
    }


def contact_sheet(
    title: str, rows: Sequence[tuple[str, Frames]], shown: Sequence[int] = (0, 4, 8, 12, 16)
) -> Image.Image:
    """Draw one picture with a row per video and a column per frame.

    Args:
        rows: pairs of a label and a video [F, H, W, 3] uint8.
        shown: the indices of the frames to draw.
    """
    gap, text_height, title_height = 6, 30, 24
    row_height = text_height + HEIGHT_PX + gap
    size = (gap + len(shown) * (WIDTH_PX + gap), title_height + len(rows) * row_height)
    sheet = Image.new("RGB", size, SHEET_PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((gap, 6), title, fill=SHEET_INK, font=ImageFont.load_default(size=14))
    font = ImageFont.load_default(size=11)
    for index, (label, video) in enumerate(rows):
        top = title_height + index * row_height
        draw.text((gap, top + 2), textwrap.fill(label, 84), fill=SHEET_INK, font=font, spacing=1)
        for column, frame in enumerate(shown):
            position = (gap + column * (WIDTH_PX + gap), top + text_height)
            sheet.paste(Image.fromarray(video[frame]), position)
    return sheet


def side_by_side(sheets: Sequence[Image.Image]) -> Image.Image:
    """Join sheets of equal height next to each other."""
    size = (sum(s.width for s in sheets), max(s.height for s in sheets))
    joined = Image.new("RGB", size, SHEET_PAPER)
    left = 0
    for sheet in sheets:
        joined.paste(sheet, (left, 0))
        left += sheet.width
    return joined
