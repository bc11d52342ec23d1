"""Print what the memory plan says for accelerators of given sizes, as Markdown.

`python -m worker plan` needs neither a device nor weights. By default it plans Wan2.1-T2V-14B for
Ascend 910B cards, which multiply decoded weights. `docs/ascend.md` has its output.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer

from quant import LoraSet, QuantError, QuantRecipe, WeightStorage, load_scales, open_packed
from worker.config import ModeConfig, ModelConfig, WorkerConfig, load_config
from worker.errors import StartError, TooLittleMemory
from worker.model_loader.memory_need import GIB, gib
from worker.model_loader.memory_plan import Placement, measure_model, place_model
from worker.model_loader.mode_plan import read_mode_loras
from worker.model_loader.model_shape import WAN_14B, ModelShape, read_model_shape

TAKEN_GIB = 3.0
"""What an idle Ascend card's system is taken to use; `npu-smi info` shows it."""

SIZES = ("832x480", "1280x720")
FRAMES = (49, 81)
MODES = (("bf16", "w8a8"), ("w8a8",), ("bf16",), ("bf16", "int8"), ("int8",))
RECIPES = {"bf16": None, "w8a8": "boundary-hif8", "int8": "boundary-int8"}


@dataclass(frozen=True, slots=True)
class Described:
    """A device that is planned for and need not be here: an Ascend 910B."""

    dtype: torch.dtype = torch.bfloat16
    vae_dtype: torch.dtype = torch.float32
    emulates: bool = True
    multiplies_codes: bool = False


@dataclass(frozen=True, slots=True)
class Case:
    """One configuration to plan."""

    config: WorkerConfig
    shape: ModelShape
    recipes: tuple[QuantRecipe | None, ...]
    loras: tuple[LoraSet, ...] | None = None

    @property
    def video(self) -> str:
        """The largest video, as size and frames."""
        return f"{self.config.model.sizes[0]}, {self.config.model.max_frames}"

    @property
    def modes(self) -> str:
        """The names of the modes."""
        return " + ".join(f"`{mode.name}`" for mode in self.config.modes)


def main(
    device_gb: Annotated[
        list[float] | None, typer.Option(min=1, help="Memory of the card in GiB; repeatable.")
    ] = None,
    taken_gb: Annotated[
        float, typer.Option(min=0, help="GiB that the system uses on an idle card.")
    ] = TAKEN_GIB,
    config: Annotated[
        Path | None,
        typer.Option(help="A worker's TOML file; by default Wan2.1-T2V-14B in usual modes."),
    ] = None,
) -> None:
    """Print the memory that a model needs, and how it is placed on cards of these sizes."""
    try:
        cases = list(published_cases() if config is None else configured_cases(config))
    except (StartError, QuantError) as error:
        typer.echo(f"worker: {error}", err=True)
        raise typer.Exit(1) from None
    typer.echo(needs_table(cases))
    typer.echo()
    typer.echo(placements_table(cases, device_gb or [64, 32], taken_gb))


def published_cases() -> Iterator[Case]:
    """Return Wan2.1-T2V-14B in the usual modes, sizes and frames."""
    for modes in MODES:
        for size in SIZES:
            for frames in FRAMES:
                config = WorkerConfig(model=_model(size, frames, modes[0]), modes=_modes(modes))
                names = [RECIPES[mode] for mode in modes]
                recipes = tuple(None if name is None else QuantRecipe.load(name) for name in names)
                yield Case(config, WAN_14B, recipes)


def configured_cases(path: Path) -> Iterator[Case]:
    """Return the configured model, in its modes and at each of its sizes.

    Raises:
        StartError, QuantError: the configuration or the model's files cannot be read.
    """
    config = load_config(path)
    shape = read_model_shape(config.model.path)
    recipes = tuple(None if mode.recipe is None else _recipe(mode) for mode in config.modes)
    read = read_mode_loras(config)
    loras = tuple(read[mode.lora] for mode in config.modes)
    for size in config.model.sizes:
        model = config.model.model_copy(update={"sizes": (size,), "default_size": size})
        yield Case(config.model_copy(update={"model": model}), shape, recipes, loras)


def _recipe(mode: ModeConfig) -> QuantRecipe:
    """Return a mode's recipe; only its scales say which blocks `protect = "auto"` protects."""
    recipe = QuantRecipe.load(str(mode.recipe))
    if not recipe.is_auto:
        return recipe
    if mode.packed is not None:
        return open_packed(mode.packed).info.recipe
    assert mode.scales is not None, "ModeConfig has checked that"
    return load_scales(mode.scales).recipe


def needs_table(cases: Iterable[Case]) -> str:
    """Return a table of the GiB that each case needs at the peak, placement by placement."""
    lines = [
        "| modes | largest video, frames | weights | encoder on the card, VAE whole | in tiles "
        "| encoder on the host, VAE whole | in tiles |",
        "|---|---|---|--:|--:|--:|--:|",
    ]
    for case in cases:
        size = measure_model(case.config, case.recipes, Described(), case.shape, case.loras)
        storages: tuple[WeightStorage, ...] = ("packed", "bf16_grid")
        for storage in storages if size.decoded_extra else storages[:1]:
            cells = [
                gib(size.need(encoder, tiled, storage).total)
                for encoder in ("device", "host")
                for tiled in (False, True)
            ]
            shown = f"`{storage}`" if size.decoded_extra else "–"
            lines.append(f"| {case.modes} | {case.video} | {shown} | {' | '.join(cells)} |")
    return "\n".join(lines)


def placements_table(cases: Iterable[Case], cards: Sequence[float], taken: float) -> str:
    """Return a table of the placements that `auto` chooses on cards with `cards` GiB of memory."""
    columns = " | ".join(f"{card:g} GiB" for card in cards)
    lines = [
        f"| modes | largest video, frames | {columns} |",
        f"|---|---|{'---|' * len(cards)}",
    ]
    for case in cases:
        cells = " | ".join(_placed(case, int((card - taken) * GIB)) for card in cards)
        lines.append(f"| {case.modes} | {case.video} | {cells} |")
    return "\n".join(lines)


def _placed(case: Case, available: int) -> str:
    try:
        placement = place_model(
            case.config, case.recipes, Described(), available, case.shape, case.loras
        )
    except TooLittleMemory:
        size = measure_model(case.config, case.recipes, Described(), case.shape, case.loras)
        return f"too small: {gib(size.need('host', True).total)}"
    return f"{_describe(placement)}: {gib(placement.need.total)}"


def _describe(placement: Placement) -> str:
    places = {"device": "encoder on the card", "encode": "encoder while it encodes"}
    parts = [places.get(placement.text_encoder, "encoder on the host")]
    parts.append("VAE in tiles" if placement.vae_tiling else "VAE whole")
    if placement.weight_storage == "bf16_grid":
        parts.insert(0, "`bf16_grid`")
    return ", ".join(parts)


def _model(size: str, frames: int, mode: str) -> ModelConfig:
    return ModelConfig(
        name="wan2.1-t2v-14b",
        path=Path("models/wan2.1-t2v-14b"),
        sizes=(size,),
        default_size=size,
        min_frames=5,
        max_frames=frames,
        default_frames=frames,
        fps=16,
        max_steps=50,
        default_steps=50,
        default_guidance_scale=5.0,
        default_mode=mode,
        max_prompt_chars=2000,
        text_tokens=512,
    )


def _modes(names: Sequence[str]) -> tuple[ModeConfig, ...]:
    return tuple(
        ModeConfig(name=name, description=name, recipe=RECIPES[name], packed=_packed(name))
        for name in names
    )


def _packed(name: str) -> Path | None:
    return None if RECIPES[name] is None else Path(f"models/wan2.1-t2v-14b-{name}")
