"""Describe a scales file as text: what it fits, its origin, and its scales by kind of linear."""

from __future__ import annotations

from pathlib import Path

from quant.calibration.scales import FORMAT_VERSION, Scales
from quant.tables import align, span


def describe_scales(scales: Scales, path: Path) -> str:
    """Return a header with one fact per line, then a table with one row per kind of linear."""
    recipe = scales.recipe
    facts = {
        "scales file": f"{path} ({path.stat().st_size:,} bytes, format {FORMAT_VERSION})",
        "fits model": scales.model_fingerprint,
        "fits recipe": f"{recipe.name} ({recipe.fingerprint})",
        "quantizes": f"{len(scales.linears)} linears in {len(recipe.quantized_blocks)} of "
        f"{recipe.total_blocks} blocks to {recipe.format}",
        "keeps in BF16": f"blocks {', '.join(map(str, recipe.protected_blocks)) or 'none'}; "
        f"linears {', '.join(recipe.kept_linears) or 'none'}",
        "weights": f"{recipe.weight_granularity.name}, {recipe.weight_policy.summary}",
        "activations": f"{recipe.act_granularity.name}, {recipe.act_policy.summary}",
        "attention": _attention(scales),
        **_origin(scales),
        "made by": f"wan-hif8 {scales.tool_version}",
    }
    width = max(map(len, facts))
    header = "\n".join(f"{name.ljust(width)}  {value}" for name, value in facts.items())
    return f"{header}\n\n{_table(scales)}"


def _origin(scales: Scales) -> dict[str, str]:
    sampler = scales.sampler
    if sampler is None:
        return {"calibrated on": "no prompts: these scales come from the weights alone"}
    return {
        "calibrated on": f"{scales.num_prompts} prompts of {scales.prompts_file} "
        f"(sha256:{scales.prompts_sha256})",
        "sampler": f"{sampler.size_text}, {sampler.num_frames} frames, "
        f"{sampler.num_inference_steps} steps in {sampler.timestep_groups} timestep groups, "
        f"guidance {sampler.guidance_scale:g}, {sampler.text_tokens} text tokens, "
        f"seeds from {sampler.seed}",
    }


def _attention(scales: Scales) -> str:
    """Return the number format of self-attention, and for FP8 the ranges of its scales."""
    if not scales.attention_scale:
        return scales.recipe.attention
    by_part: dict[str, list[float]] = {}
    for name, scale in scales.attention_scale.items():
        by_part.setdefault(name[-1], []).append(scale.item())
    ranges = (f"{part} {span(by_part[part])}" for part in "qkv")
    return f"{scales.recipe.attention}, scales {', '.join(ranges)}"


def _table(scales: Scales) -> str:
    indices: dict[str, list[int]] = {}
    for index, name in enumerate(scales.linears):
        indices.setdefault(name.split(".", 2)[2], []).append(index)
    rows: list[tuple[str, ...]] = [
        ("linear", "blocks", "weight amax", "weight scale", "act amax", "act rms", "act scale")
    ]
    for kind, positions in indices.items():
        names = [scales.linears[position] for position in positions]
        amax = rms = "not seen"
        if scales.num_prompts:
            amax = span(scales.act_amax[positions].amax((1, 2)).tolist())
            rms = span(scales.act_mean_square[positions].mean((1, 2)).sqrt().tolist())
        rows.append(
            (
                kind,
                str(len(positions)),
                span(scales.weight_amax[positions].tolist()),
                span(value for name in names for value in _weight_scales(scales, name)),
                amax,
                rms,
                span(scales.act_scale[name].item() for name in names if name in scales.act_scale),
            )
        )
    return align(rows)


def _weight_scales(scales: Scales, name: str) -> list[float]:
    values: list[float] = scales.weight_scale[name].flatten().tolist()
    return values
