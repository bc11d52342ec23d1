"""Say in words in what the calibrations of candidates differ, as that may be what tells them apart.

Scales that come from the weights alone have no calibration, and are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from quant.calibration.scales import Scales
from quant.studies.evaluation.candidates import Candidate


def unequal_calibrations(candidates: Sequence[Candidate]) -> str | None:
    """Return a sentence that names every setting by which calibrations differ, or None."""
    known = {each.name: _settings(each.scales) for each in candidates if each.scales.num_prompts}
    if len(known) < 2:
        return None
    parts = []
    for setting in next(iter(known.values())):
        values = {name: each[setting] for name, each in known.items()}
        if len(set(values.values())) > 1:
            parts.append(f"{setting} ({_listed(values)})")
    if not parts:
        return None
    return (
        "The candidates were calibrated differently, so what tells them apart may come from that, "
        f"and not from how they quantize: {'; '.join(parts)}."
    )


def _settings(scales: Scales) -> dict[str, str]:
    """Return what chose a candidate's scales, by its name for people."""
    sampler = scales.sampler
    prompts = f"{scales.num_prompts} of {scales.prompts_file}, SHA-256 {scales.prompts_sha256[:8]}…"
    found = {"prompts": prompts}
    if sampler is not None:
        own = "the model's own"
        found |= {
            "steps": str(sampler.num_inference_steps),
            "guidance": f"{sampler.guidance_scale:g}",
            "size": f"{sampler.size_text}, {sampler.num_frames} frames",
            "negative prompt": repr(sampler.negative_prompt),
            "flow shift": own if sampler.flow_shift is None else f"{sampler.flow_shift:g}",
            "first seed": str(sampler.seed),
            "text tokens": str(sampler.text_tokens),
        }
    return found


def _listed(values: Mapping[str, str]) -> str:
    """Return each value once, before the names of the candidates that have it."""
    names: dict[str, list[str]] = {}
    for name, value in values.items():
        names.setdefault(value, []).append(name)
    return ", ".join(f"{' and '.join(each)}: {value}" for value, each in names.items())
