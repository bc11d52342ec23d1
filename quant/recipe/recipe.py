"""What to quantize and how, as data: read from TOML, written to JSON, compared by fingerprint.

A recipe names everything that changes the numbers a quantized model computes, and nothing else:
no device, no path, no calibration setting. Applying one is `quant.transformer.quantize`'s work.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from dataclasses import MISSING, dataclass, field, fields, replace
from fnmatch import fnmatchcase
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any, Self

from quant.errors import RecipeError
from quant.numerics.granularity import (
    ActGranularity,
    PerChannel,
    PerToken,
    WeightGranularity,
    act_granularity,
    weight_granularity,
)
from quant.numerics.scaling import ScalePolicy, scale_policy

FORMAT_VERSION = 1
DEFAULT_RECIPE = "boundary-hif8"
_FORMATS = ("hif8",)
_ATTENTIONS = ("bf16", "fp8")
_ATTENTION_OUT = "attn1.to_out.0"


@dataclass(frozen=True)
class QuantRecipe:
    """A quantization recipe for a transformer whose blocks are `blocks.0` … `blocks.<total − 1>`.

    Attributes:
        name: what people call it; not part of the fingerprint, like `description`.
        format: the 8-bit number format, "hif8".
        total_blocks: how many blocks the transformer must have.
        protected_blocks: blocks that stay in BF16, ascending.
        linears_per_block: how many linears the patterns must match in each quantized block.
        linears: name patterns (shell wildcards) inside a block.
        kept_linears: full names or patterns of linears that stay in BF16 all the same.
        attention: in what the self-attention of quantized blocks multiplies, "bf16" or "fp8".
        source: the name or path it was loaded from, for messages; never written.
    """

    name: str
    total_blocks: int
    protected_blocks: tuple[int, ...]
    linears_per_block: int
    linears: tuple[str, ...]
    weight_granularity: WeightGranularity
    weight_policy: ScalePolicy
    act_granularity: ActGranularity
    act_policy: ScalePolicy
    kept_linears: tuple[str, ...] = ()
    format: str = "hif8"
    attention: str = "bf16"
    description: str = ""
    source: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        """Check what one value says about another.

        Raises:
            RecipeError: naming the value and its bound.
        """
        if self.format not in _FORMATS:
            raise RecipeError(f"format {self.format!r} is not one of {', '.join(_FORMATS)}")
        if self.total_blocks < 1 or self.linears_per_block < 1 or not self.linears:
            raise RecipeError(
                "a recipe needs at least one block, one linear per block and one pattern in "
                f"`linears`, not {self.total_blocks}, {self.linears_per_block} and {self.linears}"
            )
        blocks = self.protected_blocks
        if list(blocks) != sorted(set(blocks)):
            raise RecipeError(f"protected_blocks {list(blocks)} must ascend without repetition")
        outside = [block for block in blocks if not 0 <= block < self.total_blocks]
        if outside:
            raise RecipeError(
                f"protected_blocks {outside} lie outside 0..{self.total_blocks - 1}, "
                f"the blocks that total_blocks = {self.total_blocks} gives"
            )
        if isinstance(self.act_granularity, PerToken) and self.act_policy.needs_binades:
            raise RecipeError(
                f"act policy {self.act_policy.name!r} needs calibration statistics, so it cannot "
                "go with granularity 'per_token': use 'per_tensor' or another policy"
            )
        self._check_attention()

    @classmethod
    def load(cls, name_or_path: str | Path) -> Self:
        """Read a recipe that ships with the toolkit by name, or any by path (.toml or .json).

        Raises:
            RecipeError: there is none, or it does not read as one.
        """
        path = Path(name_or_path)
        is_path = path.suffix in (".toml", ".json")
        source = (
            path
            if is_path
            else resources.files("quant.recipe") / "presets" / f"{name_or_path}.toml"
        )
        if not source.is_file():
            raise RecipeError(
                f"no recipe {str(name_or_path)!r}: give a .toml or .json file, "
                f"or one of {', '.join(shipped_recipes())}"
            )
        text = source.read_text(encoding="utf-8")
        try:
            data = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
        except ValueError as error:
            raise RecipeError(f"recipe {str(name_or_path)!r} does not parse: {error}") from error
        return replace(cls.from_dict(data), source=str(name_or_path))

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Build a recipe from the shape its TOML and JSON share.

        Raises:
            RecipeError: a key is missing, unknown or of the wrong type, or out of bounds.
        """
        data = dict(data)
        version = data.pop("format_version", None)
        if version != FORMAT_VERSION:
            raise RecipeError(
                f"recipe format_version is {version!r}; this tool reads {FORMAT_VERSION}"
            )
        known = (*_SCALARS, *_LISTS)
        values: dict[str, Any] = {key: _typed(key, data.pop(key)) for key in known if key in data}
        granularity, policy = _scale_table(data, "weight")
        values["weight_granularity"] = weight_granularity(granularity)
        values["weight_policy"] = scale_policy(policy)
        granularity, policy = _scale_table(data, "act")
        values["act_granularity"] = act_granularity(granularity)
        values["act_policy"] = scale_policy(policy)
        if data:
            raise RecipeError(f"recipe has unknown keys: {', '.join(sorted(data))}")
        required = {f.name for f in fields(cls) if f.default is MISSING}
        if missing := sorted(required - set(values)):
            raise RecipeError(f"recipe lacks {', '.join(missing)}")
        return cls(**values)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote.

        Raises:
            RecipeError: as `from_dict`.
        """
        try:
            data = json.loads(text)
        except ValueError as error:
            raise RecipeError(f"recipe is not JSON: {error}") from error
        return cls.from_dict(data)

    def to_dict(self) -> dict[str, Any]:
        """The recipe in the shape its TOML and JSON share."""
        return {
            "format_version": FORMAT_VERSION,
            "name": self.name,
            "description": self.description,
            **self._numerics(),
        }

    def to_json(self) -> str:
        """The recipe as one line of JSON."""
        return json.dumps(self.to_dict(), ensure_ascii=False)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over all that changes numbers: two recipes that compute the same share it."""
        canonical = json.dumps(
            self._numerics()
            | {"linears": sorted(self.linears), "kept_linears": sorted(self.kept_linears)},
            sort_keys=True,
        )
        return f"sha256:{hashlib.sha256(canonical.encode()).hexdigest()}"

    @property
    def quantized_blocks(self) -> tuple[int, ...]:
        """The blocks that are not protected, ascending."""
        return tuple(b for b in range(self.total_blocks) if b not in self.protected_blocks)

    @property
    def scales_rows(self) -> bool:
        """Whether products may take a scale for each row of weights: channels have their own, or
        scales are no powers of two, so that those of linears that share a product (q, k, v, where
        it quantizes them) differ by any factor."""
        return isinstance(self.weight_granularity, PerChannel) or (
            not self.weight_policy.power_of_two
        )

    @property
    def attention_inputs(self) -> tuple[str, ...]:
        """What FP8 attention rounds under scales of its own, `blocks.2.attn1.q` and so on.

        Queries, keys and values, block by block; nothing where attention is BF16.
        """
        if self.attention == "bf16":
            return ()
        return tuple(f"blocks.{b}.attn1.{part}" for b in self.quantized_blocks for part in "qkv")

    def keeps(self, linear_name: str) -> bool:
        """Whether `kept_linears` names this linear (by its full name, `blocks.2.ffn.net.2`)."""
        return any(fnmatchcase(linear_name, pattern) for pattern in self.kept_linears)

    def _check_attention(self) -> None:
        if self.attention not in _ATTENTIONS:
            raise RecipeError(
                f"attention {self.attention!r} is not one of {', '.join(_ATTENTIONS)}"
            )
        if self.attention == "bf16":
            return
        # What FP8 attention writes goes straight into the output projection, under its scale.
        if isinstance(self.act_granularity, PerToken):
            raise RecipeError(
                "attention 'fp8' writes under a static scale, so it cannot go with act granularity "
                "'per_token': use 'per_tensor' or attention 'bf16'"
            )
        names = [f"blocks.{block}.{_ATTENTION_OUT}" for block in self.quantized_blocks]
        kept = [name for name in names if self.keeps(name)]
        if kept or not any(fnmatchcase(_ATTENTION_OUT, each) for each in self.linears):
            raise RecipeError(
                f"attention 'fp8' needs {_ATTENTION_OUT} quantized in every quantized block, but "
                f"{kept[0] + ' is kept' if kept else 'no pattern in `linears` matches it'}: "
                "quantize it or use attention 'bf16'"
            )

    def _numerics(self) -> dict[str, Any]:
        # Left out at its default: recipes are older than the option, and so are their fingerprints.
        attention = {} if self.attention == "bf16" else {"attention": self.attention}
        return {
            "format": self.format,
            **attention,
            "total_blocks": self.total_blocks,
            "protected_blocks": list(self.protected_blocks),
            "linears_per_block": self.linears_per_block,
            "linears": list(self.linears),
            "kept_linears": list(self.kept_linears),
            "weight": {
                "granularity": self.weight_granularity.name,
                "policy": self.weight_policy.name,
            },
            "act": {"granularity": self.act_granularity.name, "policy": self.act_policy.name},
        }


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with the toolkit."""
    folder = resources.files("quant.recipe") / "presets"
    return sorted(Path(file.name).stem for file in folder.iterdir() if file.name.endswith(".toml"))


_SCALARS: dict[str, type] = {
    "name": str,
    "description": str,
    "format": str,
    "attention": str,
    "total_blocks": int,
    "linears_per_block": int,
}
_LISTS: dict[str, type] = {"protected_blocks": int, "linears": str, "kept_linears": str}


def _typed(key: str, value: object) -> object:
    """The value of a recipe key if it has the key's type; lists become tuples."""
    if key in _SCALARS:
        if type(value) is not _SCALARS[key]:
            raise RecipeError(f"recipe key {key} must be {_SCALARS[key].__name__}, not {value!r}")
        return value
    if not isinstance(value, list) or any(type(item) is not _LISTS[key] for item in value):
        raise RecipeError(
            f"recipe key {key} must be a list of {_LISTS[key].__name__}, not {value!r}"
        )
    return tuple(value)


def _scale_table(data: dict[str, Any], key: str) -> tuple[str, str]:
    """Take table `key` out of a recipe and read its granularity and policy."""
    table = data.pop(key, None)
    if not isinstance(table, dict) or set(table) != {"granularity", "policy"}:
        raise RecipeError(f"recipe table [{key}] must hold granularity and policy, not {table!r}")
    for value in table.values():
        if type(value) is not str:
            raise RecipeError(f"recipe table [{key}] holds names, not {value!r}")
    return table["granularity"], table["policy"]
