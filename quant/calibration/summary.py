"""Describe a scales file as text: what it fits, its origin, and its scales by kind of linear."""

from __future__ import annotations

from pathlib import Path

import torch

from quant.calibration.convergence import WINDOW, Convergence, check_convergence
from quant.calibration.scales import FORMAT_VERSION, Scales
from quant.errors import CalibrationError
from quant.recipe.evidence import measured_recipe
from quant.tables import align, span

_RANKED = 10
"""How many blocks of an analysis' ranking are shown."""


def describe_scales(scales: Scales, path: Path) -> str:
    """Return a header with one fact per line, then tables: convergence, and kinds of linears."""
    recipe = scales.recipe
    facts = {
        "scales file": f"{path} ({path.stat().st_size:,} bytes, format {FORMAT_VERSION})",
        "fits model": scales.model_fingerprint,
        "fits recipe": f"{recipe.name} ({recipe.fingerprint})",
        "quantizes": f"{len(scales.linears)} linears in {len(recipe.quantized_blocks)} of "
        f"{recipe.total_blocks} blocks to {recipe.format}",
        "keeps in BF16": f"blocks {', '.join(map(str, recipe.protected_blocks)) or 'none'}; "
        f"linears {', '.join(recipe.kept_linears) or 'none'}",
        **_protection(scales),
        "weights": f"{recipe.weight_granularity.name}, {recipe.weight_policy.summary}",
        "activations": f"{recipe.act_granularity.name}, {recipe.act_policy.summary}",
        "attention": _attention(scales),
        **_origin(scales),
        "made by": f"wan-hif8 {scales.tool_version}",
    }
    width = max(map(len, facts))
    header = "\n".join(f"{name.ljust(width)}  {value}" for name, value in facts.items())
    convergence = convergence_of(scales)
    tables = [] if convergence is None else [convergence.table()]
    return "\n\n".join([header, *tables, _table(scales)])


def convergence_of(scales: Scales) -> Convergence | None:
    """Return how the scales changed from prompt to prompt; None if the file cannot tell."""
    try:
        check_convergence(scales.recipe)
    except CalibrationError:
        return None
    amax = torch.cat([scales.act_amax, scales.attention_amax])
    return Convergence.of(scales.recipe, amax) if scales.num_prompts else None


def _protection(scales: Scales) -> dict[str, str]:
    """Say which analysis has chosen the blocks in BF16, and by what."""
    evidence = scales.protection
    if evidence is None:
        return {}
    total = sum(each.mean for each in evidence.energy) or 1.0
    ranking = ", ".join(
        f"{block} ({evidence.energy[block].mean / total:.1%})"
        for block in evidence.ranking[: max(_RANKED, len(evidence.blocks))]
    )
    budget = ", ".join(f"{name} {value:g}" for name, value in evidence.budget.items())
    # Before, linears that the recipe keeps were quantized in the analysis.
    present = measured_recipe(scales.recipe, len(evidence.energy)).fingerprint
    leaves_out = scales.recipe.kept_linears and evidence.recipe == present
    kept = ", but for the linears that it keeps in BF16" if leaves_out else ""
    return {
        "chosen by": f"analysis sha256:{evidence.analysis_sha256} on {evidence.points} points of "
        f"{evidence.prompts} prompts of {evidence.prompts_file} (sha256:{evidence.prompts_sha256})",
        "its points": f"sha256:{evidence.points_sha256}",
        "its budget": f"{budget}; these blocks have {evidence.removed:.1%} of the error energy of "
        f"all {len(evidence.energy)}",
        "its ranking": f"{ranking}, by the error energy of each block quantized alone{kept}",
    }


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
        "negative prompt": sampler.negative_prompt or "none",
        "flow shift": "the model's own"
        if sampler.flow_shift is None
        else f"{sampler.flow_shift:g}",
        "settled": _settled(scales),
    }


def _settled(scales: Scales) -> str:
    """Say which share of the scales the last prompts have not changed."""
    convergence = convergence_of(scales)
    if convergence is None:
        return "not known: these scales do not follow from the largest magnitudes alone"
    if scales.num_prompts <= WINDOW:
        return f"not known: that takes more than {WINDOW} prompts"
    return (
        f"{convergence.settled[-1]:.1%} of {convergence.history.shape[1]} scales, which the last "
        f"{WINDOW} of {scales.num_prompts} prompts have not changed"
    )


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
