"""Define the format of a packed checkpoint: its files and their metadata.

A packed checkpoint is a folder with one quantized transformer and nothing else of the pipeline:
- `transformer-00001-of-0000N.safetensors` …: the state dict of the quantized tree. A quantized
  linear has `<name>.weight_qdata` (HiFloat8 codes as uint8, or int8; the kernels of every device
  read them), `<name>.weight_scale`, `<name>.act_scale` (float32; absent where each token gets its
  own scale) and its bias. All other tensors have the dtype they run in, BF16 or FP32. The
  metadata of each file is a complete `PackedInfo`.
- `scales.safetensors`: a byte-for-byte copy of the scales file it was made with, which records
  where the scales come from.

The other components of the pipeline are identified by a fingerprint only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from quant.recipe.recipe import QuantRecipe

FORMAT = "wan-hif8-packed"
FORMAT_VERSION = "1"
SCALES_FILE = "scales.safetensors"
SHARD_PATTERN = "transformer-*.safetensors"


@dataclass(frozen=True, slots=True)
class PackedInfo:
    """The metadata of a packed checkpoint, equal in all of its files.

    Attributes:
        model_fingerprint: of the source pipeline's folder (`quant.weights.fingerprint`).
        parts_fingerprint: of the same folder without the transformer's weights.
        transformer_config: the configuration the tree is built from.
        scales_sha256: SHA-256 of the scales file in the same folder.
        scales_from: the origin of the scales (`scales_origin`), for people to read.
        tool_version: version of the tool that wrote the checkpoint.
    """

    model_fingerprint: str
    parts_fingerprint: str
    recipe: QuantRecipe
    transformer_config: dict[str, Any]
    scales_sha256: str
    scales_from: dict[str, Any]
    tool_version: str

    def to_metadata(self) -> dict[str, str]:
        """Return the metadata as strings, the only values that safetensors stores."""
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "model_fingerprint": self.model_fingerprint,
            "parts_fingerprint": self.parts_fingerprint,
            "recipe": self.recipe.to_json(),
            "recipe_fingerprint": self.recipe.fingerprint,
            "transformer_config": json.dumps(self.transformer_config, sort_keys=True),
            "scales_sha256": self.scales_sha256,
            "scales_from": json.dumps(self.scales_from, ensure_ascii=False),
            "tool_version": self.tool_version,
        }

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> Self:
        """Read what `to_metadata` wrote.

        Raises:
            LookupError, ValueError, RecipeError: the metadata is not of a packed checkpoint.
        """
        config = json.loads(metadata["transformer_config"])
        if not isinstance(config, dict):
            raise ValueError(f"its transformer_config is {config!r}, not an object")
        return cls(
            model_fingerprint=metadata["model_fingerprint"],
            parts_fingerprint=metadata["parts_fingerprint"],
            recipe=QuantRecipe.from_json(metadata["recipe"]),
            transformer_config=config,
            scales_sha256=metadata["scales_sha256"],
            scales_from=json.loads(metadata["scales_from"]),
            tool_version=metadata["tool_version"],
        )


def scales_origin(prompts_file: str, prompts_sha256: str, sampler: Any, version: str) -> Any:
    """Describe the origin of a packed checkpoint's scales, for its metadata."""
    return {
        "prompts_file": prompts_file,
        "prompts_sha256": prompts_sha256,
        "sampler": None if sampler is None else sampler.to_dict(),
        "tool_version": version,
    }


def shard_name(number: int, count: int) -> str:
    """Return the name of one shard; numbers start at 1."""
    return f"transformer-{number:05d}-of-{count:05d}.safetensors"
