"""Read the worker's configuration file: one model, its bounds, and the modes to serve it in.

The file is typed TOML, checked completely before anything is loaded. A mode is data: a name, and
for a quantized mode a recipe and the scales made with it. Relative paths are relative to the file,
so a configuration can be moved together with the files it names. Whether model and scales fit each
other is checked later (`worker/model_loader/mode_plan.py`).
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    PositiveFloat,
    Tag,
    ValidationError,
    model_validator,
)

from jobs.catalog import ModelName, ModelOffer, ModeName, ModeOffer, OwnTerms, Size, WordGroup
from jobs.geometry import SIZE_MULTIPLE_PX, is_frame_count, parse_size
from worker.errors import ConfigError

TextEncoderPlacement = Literal["auto", "device", "host", "encode"]
VaeTiling = Literal["auto", "on", "off"]
WeightStorageChoice = Literal["auto", "packed", "bf16_grid"]
_WORKER_ONLY = {
    "path",
    "text_tokens",
    "flow_shift",
    "text_encoder",
    "vae_tiling",
    "weight_storage",
    "vocabulary",
}


FiniteShift = Annotated[float, Field(gt=0, allow_inf_nan=False)]
ModeShift = Annotated[
    Annotated[FiniteShift, Tag("number")] | Annotated[dict[Size, FiniteShift], Tag("table")],
    Discriminator(lambda value: "table" if isinstance(value, dict) else "number"),
]
"""A shift of all sizes, or of each."""
SchedulerName = Literal["euler"]
"""The schedulers that a mode may have in place of the model's (`worker/model_loader/euler.py`)."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelConfig(_Section):
    """`[model]`: what is offered to callers, and what only the worker uses."""

    name: ModelName
    path: Path
    sizes: tuple[Size, ...] = Field(min_length=1)
    default_size: Size
    min_frames: int = Field(ge=1)
    max_frames: int = Field(ge=1)
    default_frames: int = Field(ge=1)
    fps: int = Field(ge=1)
    max_steps: int = Field(ge=1)
    default_steps: int = Field(ge=1)
    default_guidance_scale: float = Field(ge=1, allow_inf_nan=False)
    default_mode: ModeName
    max_prompt_chars: int = Field(ge=1)
    default_negative_prompt: str = ""
    vocabulary: dict[str, tuple[str, ...]] = Field(
        default_factory=dict,
        description="What the model can draw, phrases by their kind; nothing if it takes any text.",
    )
    prompt_template: str | None = Field(
        None, description="How a prompt is built, with kinds of the vocabulary in capitals."
    )
    example_prompts: tuple[str, ...] = ()
    text_tokens: int = Field(
        ge=1, description="Tokens the text encoder sees; a longer text is refused."
    )
    flow_shift: dict[Size, FiniteShift] = Field(
        default_factory=dict,
        description="The scheduler's shift by size, where it is not the model's own.",
    )
    text_encoder: TextEncoderPlacement = Field(
        "auto", description="On the device, on the host, or on the device while it encodes."
    )
    vae_tiling: VaeTiling = Field("auto", description="Whether the VAE decodes in tiles.")
    weight_storage: WeightStorageChoice = Field(
        "auto",
        description="Hold quantized weights as codes of 8 bits, or decoded once, as BF16 numbers, "
        "where products are in BF16 anyway; the frames are the same.",
    )

    @model_validator(mode="after")
    def _bounds_are_possible(self) -> Self:
        for size in self.sizes:
            if any(side % SIZE_MULTIPLE_PX for side in parse_size(size)):
                raise ValueError(f"size {size} is not made of multiples of {SIZE_MULTIPLE_PX} px")
        for name in ("min_frames", "max_frames"):
            if not is_frame_count(getattr(self, name)):
                raise ValueError(f"{name} = {getattr(self, name)} is not of the form 4k+1")
        self.check_sizes(self.flow_shift)
        self.offer(fingerprint="unread")
        return self

    def check_sizes(self, flow_shift: Mapping[Size, float]) -> None:
        """Raise ValueError if shifts are given for sizes that are not offered."""
        unknown = sorted(set(flow_shift) - set(self.sizes))
        if unknown:
            raise ValueError(f"flow_shift names sizes that are not offered: {', '.join(unknown)}")

    def offer(self, fingerprint: str, tokenizer: str | None = None) -> ModelOffer:
        """Build the part that callers see.

        Args:
            fingerprint: identifies the loaded model by its content.
            tokenizer: identifies the tokenizer by its content.

        Raises:
            ValueError: a default lies outside its bounds.
        """
        offered = self.model_dump(exclude=_WORKER_ONLY)
        return ModelOffer(
            fingerprint=fingerprint,
            tokenizer=tokenizer,
            max_prompt_tokens=self.text_tokens,
            vocabulary=tuple(
                WordGroup(kind=kind, phrases=phrases) for kind, phrases in self.vocabulary.items()
            ),
            **offered,
        )


class FirstBlockCache(_Section):
    """`[modes.step_cache]`: skip a step's other blocks if its first one changed little."""

    method: Literal["first_block"]
    threshold: float = Field(
        gt=0, description="Of the change in what the first block adds, relative to its size."
    )


class MagCache(_Section):
    """`[modes.step_cache]`: skip steps according to earlier measurements of the model."""

    method: Literal["mag"]
    threshold: float = Field(gt=0, description="Of the error that skipped steps may add up to.")
    mag_ratios: tuple[PositiveFloat, ...] = Field(
        min_length=2,
        description="For each step, the size of what all blocks add over that of the step before.",
    )
    max_skipped_steps: int = Field(3, ge=1, description="In a row.")
    kept_share: float = Field(0.2, ge=0, le=1, description="Of the steps, at the start.")


StepCache = Annotated[FirstBlockCache | MagCache, Field(discriminator="method")]


class LoraConfig(_Section):
    """An entry of `lora` in `[[modes]]`."""

    path: Path
    scale: float = Field(1.0, allow_inf_nan=False, description="Multiplies what the LoRA adds.")


class ModeConfig(OwnTerms):
    """`[[modes]]`: BF16 without a recipe; with one, it needs scales or a packed checkpoint.

    Steps, guidance, shift and scheduler are those of `[model]` where the mode has none of its own.
    """

    name: ModeName
    description: str = Field(min_length=1)
    recipe: str | None = Field(None, description="A recipe shipped with quant, or the path of one.")
    scales: Path | None = Field(None, description="Quantize at every start, with these scales.")
    packed: Path | None = Field(
        None, description="The folder `python -m quant convert` has made; it holds its scales."
    )
    lora: tuple[LoraConfig, ...] = Field(
        (), description="Merged into the weights before they are quantized, if they are."
    )

    exact_emulation: bool = Field(
        default=False,
        description="Decode weights to BF16 for each product: slow, and the same bits everywhere.",
    )
    step_cache: StepCache | None = Field(
        None, description="Leave out parts of steps that resemble earlier ones; costs quality."
    )
    flow_shift: ModeShift | None = Field(None, description="The scheduler's shift.")
    scheduler: SchedulerName | None = Field(None, description="By default the model's own.")

    @property
    def weights_key(self) -> tuple[object, ...]:
        """Everything that determines the mode's weights; modes with equal keys share them all.

        Recipes that take the same scales differ in their attention at most.
        """
        if self.recipe is None:
            return (self.lora,)
        return (self.lora, self.scales, self.packed, self.exact_emulation)

    @property
    def transformer_key(self) -> tuple[object, ...]:
        """Everything that determines the mode's transformer; modes with equal keys share one."""
        return (*self.weights_key, self.recipe)

    @property
    def variant(self) -> str | None:
        """What changes the frames besides recipe, scales and LoRAs; None if nothing does."""
        parts = ["exact_emulation"] if self.exact_emulation else []
        if self.step_cache is not None:
            values = json.dumps(self.step_cache.model_dump(), sort_keys=True)
            digest = hashlib.sha256(values.encode()).hexdigest()
            parts.append(f"step_cache:{self.step_cache.method}:{digest[:12]}")
        if self.scheduler is not None:
            parts.append(f"scheduler:{self.scheduler}")
        if isinstance(self.flow_shift, dict):
            shifts = sorted(self.flow_shift.items())
            parts.append(f"flow_shift:{','.join(f'{size}={shift:g}' for size, shift in shifts)}")
        elif self.flow_shift is not None:
            parts.append(f"flow_shift:{self.flow_shift:g}")
        return "+".join(parts) or None

    def offer(self) -> ModeOffer:
        """Build the part that callers see, without what only the loaded mode knows."""
        shown = {"name": self.name, "description": self.description, "variant": self.variant}
        return ModeOffer(**shown | self.own)

    @model_validator(mode="after")
    def _recipe_and_scales_come_together(self) -> Self:
        if self.exact_emulation and self.recipe is None:
            raise ValueError(f"mode {self.name!r} has no recipe, so there is nothing to emulate")
        if self.scales is not None and self.packed is not None:
            raise ValueError(
                f"mode {self.name!r} names both scales and a packed checkpoint, which has its own: "
                "leave one out"
            )
        if (self.recipe is None) != (self.scales is None and self.packed is None):
            raise ValueError(
                f"mode {self.name!r} needs both recipe and scales, or neither; packed stands for "
                "scales"
            )
        return self


class PreviewConfig(_Section):
    """`[preview]`: moving pictures of running jobs, at most one in so many steps and seconds."""

    enabled: bool = True
    every_steps: int = Field(1, ge=1)
    every_s: float = Field(2.0, ge=0.2, allow_inf_nan=False)
    map: Path | None = Field(
        None,
        description="Made by `python -m quant preview-map` for this model's VAE; by default "
        "scales/preview-map.json in the model's folder, if it is there.",
    )


class WorkerConfig(_Section):
    """The whole configuration file."""

    model: ModelConfig
    modes: tuple[ModeConfig, ...] = Field(min_length=1)
    preview: PreviewConfig = PreviewConfig()

    @model_validator(mode="after")
    def _modes_are_distinct(self) -> Self:
        names = [mode.name for mode in self.modes]
        if len(set(names)) != len(names):
            raise ValueError(f"modes have the same name: {', '.join(names)}")
        if self.model.default_mode not in names:
            raise ValueError(
                f"default_mode {self.model.default_mode!r} is not a mode: {', '.join(names)}"
            )
        return self

    @model_validator(mode="after")
    def _modes_fit_the_model(self) -> Self:
        offer = self.model.offer(fingerprint="unread")
        for mode in self.modes:
            try:
                if isinstance(mode.flow_shift, dict):
                    self.model.check_sizes(mode.flow_shift)
                offer.terms(mode)
            except ValueError as error:
                usual = "; what a mode does not set is [model]'s" if mode.own else ""
                raise ValueError(f"mode {mode.name!r}: {error}{usual}") from None
        return self


def load_config(path: Path) -> WorkerConfig:
    """Read and check a configuration file, and make its relative paths absolute.

    Raises:
        ConfigError: names the file and everything that is wrong in it.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"There is no configuration file {path}. Name one with --config or WORKER_CONFIG."
        ) from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"The configuration file {path} cannot be read: {error}.") from error
    try:
        config = WorkerConfig.model_validate(data)
    except ValidationError as error:
        raise ConfigError(f"The configuration file {path} is wrong: {_describe(error)}.") from None
    return _resolve_paths(config, path.resolve().parent)


def _describe(error: ValidationError) -> str:
    return "; ".join(
        f"{'.'.join(map(str, e['loc'])) or 'file'}: {e['msg'].removeprefix('Value error, ')}"
        for e in error.errors(include_url=False, include_input=False)
    )


def _resolve_paths(config: WorkerConfig, folder: Path) -> WorkerConfig:
    model = config.model.model_copy(update={"path": (folder / config.model.path).resolve()})
    modes = tuple(_resolve_mode(mode, folder) for mode in config.modes)
    preview = config.preview
    if preview.map is not None:
        preview = preview.model_copy(update={"map": (folder / preview.map).resolve()})
    return config.model_copy(update={"model": model, "modes": modes, "preview": preview})


def _resolve_mode(mode: ModeConfig, folder: Path) -> ModeConfig:
    paths: dict[str, object] = {}
    if mode.lora:
        paths["lora"] = tuple(
            each.model_copy(update={"path": (folder / each.path).resolve()}) for each in mode.lora
        )
    for key in ("scales", "packed"):
        path = getattr(mode, key)
        if path is not None:
            paths[key] = (folder / path).resolve()
    # A recipe is a path if it looks like one; otherwise it is the name of a shipped recipe.
    if mode.recipe is not None and Path(mode.recipe).suffix in (".toml", ".json"):
        paths["recipe"] = str((folder / mode.recipe).resolve())
    return mode.model_copy(update=paths)
