"""Define recipes: what to quantize and how, as data.

A recipe is read from TOML, written to JSON and compared by fingerprint. It contains everything that
changes the numbers a quantized model computes, and nothing else: no device, no path, no calibration
setting. `quant.transformer.quantize` applies it.
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
from quant.numerics.scaling import POLICIES, ScalePolicy, scale_policy
from quant.recipe.keys import LISTS, SCALARS, take_scale_table, typed
from quant.recipe.sparse import SparseSettings

FORMAT_VERSION = 1
DEFAULT_RECIPE = "boundary-hif8"
AUTO = "auto"
_FORMATS = ("hif8", "int8")
_ATTENTIONS = ("bf16", "fp8", "sparse")
_FP8_OPTIONS = {"rotate_qk": True, "attention_bf16_steps": 0}
"""The options of FP8 attention and their defaults, at which they are not written."""


@dataclass(frozen=True)
class QuantRecipe:
    """A quantization recipe for a transformer whose blocks are `blocks.0` … `blocks.<total − 1>`.

    Attributes:
        name: a name for people; like `description`, it is not part of the fingerprint.
        format: the 8-bit number format: "hif8", or "int8", which always has a scale for each output
            channel and each token.
        total_blocks: how many blocks the transformer must have; 0 where `protect` leaves it open.
        protected_blocks: blocks that stay in BF16, ascending.
        protect: "auto" if an analysis chooses the protected blocks, and none are listed; such a
            recipe is `resolved` before it is used. Otherwise "".
        linears_per_block: how many linears the patterns must match in each quantized block.
        linears: name patterns (shell wildcards) inside a block.
        kept_linears: full names or patterns of linears that stay in BF16 despite `linears`.
        attention: self-attention of the quantized blocks: in "bf16"; in "fp8"; or "sparse", in
            BF16 over some of the tokens.
        rotate_qk: whether FP8 attention rotates queries and keys before it rounds them
            (`quant.numerics.hadamard`).
        attention_bf16_steps: how many steps of a job, the first ones, run FP8 attention in BF16.
        sparse: which tokens sparse attention keeps; None for the others.
        source: the name or path it was loaded from, for messages; it is never written to a file.
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
    rotate_qk: bool = True
    attention_bf16_steps: int = 0
    sparse: SparseSettings | None = None
    protect: str = ""
    description: str = ""
    source: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        """Check the values against their bounds and against each other.

        Raises:
            RecipeError: naming the value and its bound.
        """
        if self.format not in _FORMATS:
            raise RecipeError(f"format {self.format!r} is not one of {', '.join(_FORMATS)}")
        self._check_protect()
        least_blocks = 0 if self.is_auto else 1
        if self.total_blocks < least_blocks or self.linears_per_block < 1 or not self.linears:
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
        if self._rounds_each_token and self.act_policy.needs_binades:
            raise RecipeError(
                f"act policy {self.act_policy.name!r} needs calibration statistics, so it cannot "
                "go with granularity 'per_token': use 'per_tensor' or another policy"
            )
        self._check_format()
        self._check_attention()

    @classmethod
    def load(cls, name_or_path: str | Path) -> Self:
        """Read a shipped recipe by name, or any recipe by path (.toml or .json).

        Raises:
            RecipeError: there is no such recipe, or it is not valid.
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
        """Build a recipe from a dictionary with the structure of its TOML and JSON.

        Raises:
            RecipeError: a key is missing, unknown or of the wrong type, or out of bounds.
        """
        data = dict(data)
        version = data.pop("format_version", None)
        if version != FORMAT_VERSION:
            raise RecipeError(
                f"recipe format_version is {version!r}; this tool reads {FORMAT_VERSION}"
            )
        known = (*SCALARS, *LISTS)
        values: dict[str, Any] = {key: typed(key, data.pop(key)) for key in known if key in data}
        if "protect" in values:
            if "protected_blocks" in values:
                raise RecipeError(
                    "a recipe has either protected_blocks or protect = 'auto', not both"
                )
            values = {"total_blocks": 0, "protected_blocks": ()} | values
        if "sparse" in data:
            values["sparse"] = SparseSettings.from_table(data.pop("sparse"))
        granularity, policy = take_scale_table(data, "weight")
        values["weight_granularity"] = weight_granularity(granularity)
        values["weight_policy"] = scale_policy(policy)
        granularity, policy = take_scale_table(data, "act")
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
            RecipeError: the text is not JSON, or as for `from_dict`.
        """
        try:
            data = json.loads(text)
        except ValueError as error:
            raise RecipeError(f"recipe is not JSON: {error}") from error
        return cls.from_dict(data)

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as a dictionary with the structure of its TOML and JSON."""
        return {
            "format_version": FORMAT_VERSION,
            "name": self.name,
            "description": self.description,
            **self._numerics(),
        }

    def to_json(self) -> str:
        """Return the recipe as one line of JSON."""
        return json.dumps(self.to_dict(), ensure_ascii=False)

    @cached_property
    def fingerprint(self) -> str:
        """Return a SHA-256 over all values that change numbers; equal recipes have equal ones."""
        canonical = json.dumps(
            self._numerics()
            | {"linears": sorted(self.linears), "kept_linears": sorted(self.kept_linears)},
            sort_keys=True,
        )
        return f"sha256:{hashlib.sha256(canonical.encode()).hexdigest()}"

    @property
    def calibrated(self) -> Self:
        """Return the recipe whose scales this one uses.

        Calibration runs the BF16 model, whose attention is exact in every step, and sparse
        attention rounds nothing of its own.
        """
        attention = self.attention if self.sparse is None else "bf16"
        return replace(self, attention=attention, sparse=None, attention_bf16_steps=0)

    @property
    def exact_attention_steps(self) -> int:
        """Return how many steps, the first ones, have neither FP8 nor sparse attention."""
        return self.attention_bf16_steps if self.sparse is None else self.sparse.dense_steps

    @property
    def is_auto(self) -> bool:
        """Return whether it is still open which blocks are protected."""
        return self.protect == AUTO

    def resolved(self, total_blocks: int, protected_blocks: tuple[int, ...]) -> Self:
        """Return the same recipe with the blocks that an analysis has chosen.

        Raises:
            RecipeError: the recipe is for another number of blocks, or a block is outside.
        """
        if self.total_blocks not in (0, total_blocks):
            raise RecipeError(
                f"recipe {self.name!r} is for {self.total_blocks} blocks, the analysis is of a "
                f"model with {total_blocks}: leave total_blocks out, or analyze that model"
            )
        return replace(
            self, protect="", total_blocks=total_blocks, protected_blocks=protected_blocks
        )

    def check_resolved(self) -> None:
        """Refuse a recipe whose protected blocks are not known yet.

        Raises:
            RecipeError: says how they become known.
        """
        if self.is_auto:
            raise RecipeError(
                f"recipe {self.name!r} has protect = 'auto', so that only an analysis, or a scales "
                "file that was calibrated with one, says which blocks it protects: run "
                "`python -m quant analyze` and `python -m quant calibrate --analysis FOLDER`"
            )

    @property
    def quantized_blocks(self) -> tuple[int, ...]:
        """Return the blocks that are not protected, ascending.

        Raises:
            RecipeError: they are not known yet (`check_resolved`).
        """
        self.check_resolved()
        return tuple(b for b in range(self.total_blocks) if b not in self.protected_blocks)

    @property
    def per_row_scales(self) -> bool:
        """Return whether a product may need a scale for each row of weights.

        This is so if each channel has its own scale, or if scales need not be powers of two: then
        the scales of linears that share a product (q, k, v, if quantized) differ by any factor.
        """
        return isinstance(self.weight_granularity, PerChannel) or (
            not self.weight_policy.power_of_two
        )

    @property
    def needs_prompts(self) -> bool:
        """Return whether a scale is chosen from activations, which only prompts give."""
        return not self._rounds_each_token or self.attention == "fp8"

    @property
    def attention_inputs(self) -> tuple[str, ...]:
        """Return the names of the tensors that FP8 attention rounds under scales of their own.

        These are queries, keys and values, block by block: `blocks.2.attn1.q` and so on. There are
        none for attention in BF16.
        """
        if self.attention != "fp8":
            return ()
        return tuple(f"blocks.{b}.attn1.{part}" for b in self.quantized_blocks for part in "qkv")

    def keeps(self, linear_name: str) -> bool:
        """Return whether `kept_linears` matches a full name such as `blocks.2.ffn.net.2`."""
        return any(fnmatchcase(linear_name, pattern) for pattern in self.kept_linears)

    def _check_protect(self) -> None:
        if self.protect not in ("", AUTO):
            raise RecipeError(
                f"protect {self.protect!r} is not 'auto': list blocks as protected_blocks instead"
            )
        if self.is_auto and self.protected_blocks:
            raise RecipeError("protect = 'auto' and a list of protected_blocks exclude each other")

    def _check_format(self) -> None:
        """Refuse policies and granularities that do not go with the number format."""
        for what, policy in (("weight", self.weight_policy), ("act", self.act_policy)):
            if policy.format != self.format:
                fitting = [name for name, each in POLICIES.items() if each.format == self.format]
                raise RecipeError(
                    f"{what} policy {policy.name!r} chooses scales for format {policy.format!r}, "
                    f"not for {self.format!r}: use {' or '.join(map(repr, fitting))}"
                )
        if self.format != "int8":
            return
        for what, found, wanted in (
            ("weight", self.weight_granularity, PerChannel.name),
            ("act", self.act_granularity, PerToken.name),
        ):
            if found.name != wanted:
                raise RecipeError(
                    f"format 'int8' needs {what} granularity {wanted!r}, not {found.name!r}"
                )
        if self.attention == "fp8":
            raise RecipeError(
                "attention 'fp8' rounds queries, keys and values to HiFloat8 under calibrated "
                "scales, which format 'int8' does not have: use attention 'bf16'"
            )

    def _check_attention(self) -> None:
        if self.attention not in _ATTENTIONS:
            raise RecipeError(
                f"attention {self.attention!r} is not one of {', '.join(_ATTENTIONS)}"
            )
        if (self.attention == "sparse") != (self.sparse is not None):
            raise RecipeError(
                f"attention {self.attention!r} and a table [sparse] do not go together: "
                "attention 'sparse' needs the table, and no other takes it"
                if self.sparse is not None
                else "attention 'sparse' needs a table [sparse], which says what it keeps"
            )
        if self.attention != "fp8" and (options := self._fp8_options()):
            raise RecipeError(
                f"{min(options)} has no effect with attention {self.attention!r}: leave it out"
            )
        if self.attention_bf16_steps < 0:
            raise RecipeError(f"attention_bf16_steps {self.attention_bf16_steps} is below 0")
        # Blocks of INT8 are fused although each token has its scale.
        if self.attention != "bf16" and self.format == "hif8" and self._rounds_each_token:
            raise RecipeError(
                f"attention {self.attention!r} needs fused blocks, which act granularity "
                "'per_token' rules out: use 'per_tensor' or attention 'bf16'"
            )

    @property
    def _rounds_each_token(self) -> bool:
        return isinstance(self.act_granularity, PerToken)

    def _fp8_options(self) -> dict[str, Any]:
        values = {key: getattr(self, key) for key in _FP8_OPTIONS}
        return {key: value for key, value in values.items() if value != _FP8_OPTIONS[key]}

    def _numerics(self) -> dict[str, Any]:
        # Omitted at their defaults, so that older recipes keep their fingerprints.
        attention = self._fp8_options()
        if self.attention != "bf16":
            attention = {"attention": self.attention, **attention}
        if self.sparse is not None:
            attention["sparse"] = self.sparse.to_table()
        blocks: dict[str, Any] = {"total_blocks": self.total_blocks} if self.total_blocks else {}
        if self.is_auto:
            blocks["protect"] = self.protect
        else:
            blocks["protected_blocks"] = list(self.protected_blocks)
        return {
            "format": self.format,
            **attention,
            **blocks,
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
    """Return the names of the recipes that ship with the toolkit."""
    folder = resources.files("quant.recipe") / "presets"
    return sorted(Path(file.name).stem for file in folder.iterdir() if file.name.endswith(".toml"))
