"""Say in words in what the calibrations of candidates differ, as that may be what tells them apart.

Scales that come from the weights alone have no calibration, and are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from quant.calibration.scales import Scales
from quant.studies.evaluation.candidates import Candidate


def unequal_calibrations(candidates: Sequence[Candidate]) -> str | None:
    """Return a sentence that names every setting by which calibrations differ, or None."""
    known = {each.name: each.scales for each in candidates if each.scales.num_prompts}
    parts = []
    # Files of prompts are told apart by what is in them, whatever their names are.
    if len({(each.num_prompts, each.prompts_sha256) for each in known.values()}) > 1:
        parts.append(f"prompts ({_listed({name: _prompts(each) for name, each in known.items()})})")
    settings = {name: _settings(each) for name, each in known.items()}
    for setting in next(iter(settings.values()), {}):
        values = {name: each[setting] for name, each in settings.items()}
        if len(set(values.values())) > 1:
            parts.append(f"{setting} ({_listed(values)})")
    if not parts:
        return None
    return (
        "The candidates were calibrated differently, so what tells them apart may come from that, "
        f"and not from how they quantize: {'; '.join(parts)}."
    )


def _prompts(scales: Scales) -> str:
    return f"{scales.num_prompts} of {scales.prompts_file}, SHA-256 {scales.prompts_sha256[:8]}…"


def _settings(scales: Scales) -> dict[str, str]:
    """Return how the prompts were sampled that chose a candidate's scales, by names for people."""
    sampler = scales.sampler
    assert sampler is not None, "it is None only where no prompts were used"
    shift = sampler.flow_shift
    return {
        "steps": str(sampler.num_inference_steps),
        "guidance": f"{sampler.guidance_scale:g}",
        "size": f"{sampler.size_text}, {sampler.num_frames} frames",
        "negative prompt": repr(sampler.negative_prompt),
        "flow shift": "the model's own" if shift is None else f"{shift:g}",
        "first seed": str(sampler.seed),
        "text tokens": str(sampler.text_tokens),
    }


def _listed(values: Mapping[str, str]) -> str:
    """Return each value once, before the names of the candidates that have it."""
    names: dict[str, list[str]] = {}
    for name, value in values.items():
        names.setdefault(value, []).append(name)
    return ", ".join(f"{' and '.join(each)}: {value}" for value, each in names.items())
