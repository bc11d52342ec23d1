"""Define the sampling settings of calibration: bounds, and defaults for known models."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

from quant.errors import CalibrationError

_MAX_SEED = 2**63 - 1
"""The largest seed that the service takes, too."""


@dataclass(frozen=True, slots=True)
class SamplerSettings:
    """The settings, besides prompts and model, that determine the activations in calibration.

    Attributes:
        size: (width, height) of the video in pixels.
        guidance_scale: at least 1, which turns guidance off.
        text_tokens: length prompts are padded to.
        seed: seed of the first prompt's noise; the i-th prompt gets seed + i.
        timestep_groups: number of groups of neighbouring steps with separate statistics.
        flow_shift: of the schedule of noise levels; None for the model's own.
    """

    size: tuple[int, int]
    num_frames: int
    num_inference_steps: int
    guidance_scale: float
    text_tokens: int
    negative_prompt: str = ""
    seed: int = 0
    timestep_groups: int = 4
    flow_shift: float | None = None

    def __post_init__(self) -> None:
        """Check the bounds that all Wan models share.

        Raises:
            CalibrationError: naming the setting, its value and its bound.
        """
        if any(side < 16 or side % 16 for side in self.size):
            raise CalibrationError(f"size {self.size_text} must be in multiples of 16 px")
        if self.num_frames < 1 or self.num_frames % 4 != 1:
            raise CalibrationError(f"frames {self.num_frames} must be 4k + 1: 1, 5, 9, ...")
        if self.timestep_groups < 1 or self.num_inference_steps < self.timestep_groups:
            raise CalibrationError(
                f"steps {self.num_inference_steps} must be at least "
                f"{max(1, self.timestep_groups)}, one for each timestep group"
            )
        # The pipeline would treat lower values as 1, and make NaN of NaN.
        if not 1 <= self.guidance_scale < math.inf:
            raise CalibrationError(
                f"guidance scale {self.guidance_scale:g} must be a number from 1 up; 1 turns "
                "guidance off"
            )
        if self.text_tokens < 1:
            raise CalibrationError(f"text tokens {self.text_tokens} must be at least 1")
        if not 0 <= self.seed <= _MAX_SEED:
            raise CalibrationError(f"seed {self.seed} must be from 0 to {_MAX_SEED}")
        if self.flow_shift is not None and not 0 < self.flow_shift < math.inf:
            raise CalibrationError(
                f"flow shift {self.flow_shift:g} must be a number above 0; 1 shifts nothing"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build settings from what `to_dict` returned, possibly by way of JSON.

        Raises:
            CalibrationError: a value is out of bounds.
            KeyError, TypeError: a setting is missing, or there is an unknown one.
        """
        return cls(**{**values, "size": tuple(values["size"])})

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as a dictionary for JSON.

        A flow shift is left out where it is the model's own: files older than that setting have
        the same content.
        """
        values = asdict(self)
        if self.flow_shift is None:
            del values["flow_shift"]
        return values

    @property
    def size_text(self) -> str:
        """Return the size in the usual notation, such as 832x480."""
        return f"{self.size[0]}x{self.size[1]}"

    def arguments(self) -> list[str]:
        """Return the arguments of `python -m quant calibrate` that repeat these settings."""
        return [
            *("--steps", str(self.num_inference_steps)),
            *("--size", self.size_text),
            *("--frames", str(self.num_frames)),
            *("--guidance-scale", f"{self.guidance_scale:g}"),
            *("--text-tokens", str(self.text_tokens)),
            *("--seed", str(self.seed)),
            *(("--negative-prompt", self.negative_prompt) if self.negative_prompt else ()),
            *(("--flow-shift", f"{self.flow_shift:g}") if self.flow_shift is not None else ()),
        ]

    def group_of_step(self, step: int) -> int:
        """Return the timestep group of a step; step 0 is the noisiest."""
        return step * self.timestep_groups // self.num_inference_steps


# The settings a transformer was trained for, by its width (heads times head size).
_DEFAULTS = {
    128: SamplerSettings((96, 96), 17, 20, 4.0, 64),  # the miniature
    1536: SamplerSettings((832, 480), 81, 50, 5.0, 512),  # Wan2.1-T2V-1.3B
    5120: SamplerSettings((832, 480), 81, 50, 5.0, 512),  # Wan2.1-T2V-14B
}


def default_sampler(transformer_config: dict[str, Any]) -> SamplerSettings:
    """Return the default settings to calibrate a Wan transformer with.

    Raises:
        CalibrationError: no model of this width is known, or the configuration has no width.
    """
    heads = transformer_config.get("num_attention_heads")
    head_width = transformer_config.get("attention_head_dim")
    if not isinstance(heads, int) or not isinstance(head_width, int):
        raise CalibrationError(
            "transformer/config.json must give num_attention_heads and attention_head_dim as whole "
            f"numbers, not {heads!r} and {head_width!r}"
        )
    width = heads * head_width
    if width not in _DEFAULTS:
        raise CalibrationError(
            f"no default size for a transformer {width} wide (known: "
            f"{', '.join(map(str, _DEFAULTS))}): give --size, --frames, --steps and --text-tokens"
        )
    return _DEFAULTS[width]


def resolve_sampler(
    transformer_config: dict[str, Any], overrides: dict[str, Any]
) -> SamplerSettings:
    """Return the model's default settings, replaced by those `overrides` that are not None.

    Raises:
        CalibrationError: a value is out of bounds, or an unknown model needs more overrides.
    """
    given = {name: value for name, value in overrides.items() if value is not None}
    if {"size", "num_frames", "num_inference_steps", "text_tokens"} <= given.keys():
        return SamplerSettings(**({"guidance_scale": 5.0} | given))
    return replace(default_sampler(transformer_config), **given)
