"""Read from a worker's configuration file how the service samples, to calibrate on just that.

Only `[model]` is read, and of it only what changes activations. The worker checks the whole file
when it starts; here, a key that it does not know is refused as well, since a mistyped one would
leave a default in force without a word.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from quant.errors import CalibrationError

KNOWN_KEYS: Final = frozenset(
    {
        *("name", "path", "sizes", "default_size", "min_frames", "max_frames", "default_frames"),
        *("fps", "max_steps", "default_steps", "default_guidance_scale", "default_mode"),
        *("max_prompt_chars", "default_negative_prompt", "vocabulary", "prompt_template"),
        *("example_prompts", "text_tokens", "flow_shift", "text_encoder", "vae_tiling"),
        "weight_storage",
    }
)
"""The keys of the worker's `[model]`."""


@dataclass(frozen=True, slots=True)
class ServiceConfig:
    """How a worker samples by default.

    Attributes:
        file: the configuration file.
        sizes: all sizes that are offered, such as 832x480.
        default_size: (width, height) in pixels.
        flow_shifts: by size; a size that is not there has the model's own.
    """

    file: Path
    sizes: tuple[str, ...]
    default_size: tuple[int, int]
    num_frames: int
    num_inference_steps: int
    guidance_scale: float
    text_tokens: int
    negative_prompt: str
    flow_shifts: Mapping[str, float]

    def settings(self, size: tuple[int, int] | None) -> dict[str, Any]:
        """Return the sampler's settings for a size, by default the service's own.

        Raises:
            CalibrationError: the service does not offer the size.
        """
        chosen = size or self.default_size
        text = f"{chosen[0]}x{chosen[1]}"
        if text not in self.sizes:
            raise CalibrationError(
                f"size {text} is none that {self.file} offers ({', '.join(self.sizes)}), so it is "
                "not known how the service samples it: choose one of these, or leave out --config"
            )
        return {
            "size": chosen,
            "num_frames": self.num_frames,
            "num_inference_steps": self.num_inference_steps,
            "guidance_scale": self.guidance_scale,
            "text_tokens": self.text_tokens,
            "negative_prompt": self.negative_prompt,
            "flow_shift": self.flow_shifts.get(text),
        }


def read_service_config(file: Path) -> ServiceConfig:
    """Read a worker's configuration file.

    Raises:
        CalibrationError: it cannot be read, a key is missing, of the wrong type or not known.
    """
    try:
        data = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CalibrationError(
            f"cannot read the worker's configuration {file}: {reason}; give a file like "
            "deploy/wan-14b.toml"
        ) from error
    model = data.get("model")
    if not isinstance(model, dict):
        raise CalibrationError(
            f"{file} has no table [model]: give a worker's configuration, like deploy/wan-14b.toml"
        )
    if unknown := sorted(model.keys() - KNOWN_KEYS):
        raise CalibrationError(
            f"{file}: [model] has unknown keys, which the worker would refuse: {', '.join(unknown)}"
        )
    keys = _Keys(file, model)
    shifts = _Keys(file, keys.get("flow_shift", dict, {}), "model.flow_shift")
    sizes = keys.get("sizes", list)
    return ServiceConfig(
        file=file,
        sizes=tuple(map(str, sizes)),
        default_size=keys.size("default_size"),
        num_frames=keys.get("default_frames", int),
        num_inference_steps=keys.get("default_steps", int),
        guidance_scale=keys.get("default_guidance_scale", float),
        text_tokens=keys.get("text_tokens", int),
        negative_prompt=keys.get("default_negative_prompt", str, ""),
        flow_shifts={size: shifts.get(size, float) for size in shifts.values},
    )


@dataclass(frozen=True, slots=True)
class _Keys:
    """The values of a table, with errors that name the file and the key."""

    file: Path
    values: Mapping[str, Any]
    table: str = "model"

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        value = self.values.get(key, default)
        if value is None:
            raise CalibrationError(f"{self.file}: [{self.table}] lacks {key}")
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise CalibrationError(
                f"{self.file}: {key} in [{self.table}] must be of the type {kind.__name__}, not "
                f"{value!r}"
            )
        return value

    def size(self, key: str) -> tuple[int, int]:
        text = self.get(key, str)
        width, x, height = text.partition("x")
        if not (x and width.isdecimal() and height.isdecimal()):
            raise CalibrationError(
                f"{self.file}: {key} in [{self.table}] must be WIDTHxHEIGHT, like 832x480, not "
                f"{text!r}"
            )
        return int(width), int(height)
