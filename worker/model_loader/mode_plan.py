"""Read and check what each mode is made of, and choose its kernels, before any weights are read.

Everything that can be refused is refused here: the recipes, and whether each scales file and packed
checkpoint was made for this model and recipe.
"""

from __future__ import annotations

import json
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import diffusers

import quant
from quant.kernels.selection import KernelChoice
from quant.kernels.self_test import BlockShape
from quant.transformer.meta_model import (
    shared_meta_model,
)
from quant.weights.fingerprint import read_transformer_config
from worker.config import ModeConfig, WorkerConfig
from worker.device import Device
from worker.errors import ModelUnusable

logger = logging.getLogger(__name__)

_PARTS = (
    "model_index.json",
    "tokenizer",
    "text_encoder/config.json",
    "transformer/config.json",
    "vae/config.json",
    "scheduler/scheduler_config.json",
)


KernelsByMode = dict[tuple[object, ...], KernelChoice | None]
"""The kernels of each distinct mode, by what it is made with."""


@dataclass(frozen=True, slots=True)
class ModePlan:
    """One mode's recipe and scales, read and found to fit; both None for BF16.

    `packed` is the checkpoint that has its transformer ready, where there is one. `shape` is of the
    model's blocks.
    """

    config: ModeConfig
    shape: BlockShape
    recipe: quant.QuantRecipe | None
    scales: quant.Scales | None
    packed: quant.PackedCheckpoint | None = None


def fingerprint_model(config: WorkerConfig) -> str:
    """Fingerprint the model, or take it from a packed checkpoint that goes with its other parts.

    The transformer's own weights are wanted only where a mode runs or quantizes them.

    Raises:
        ModelUnusable: the folder's other parts are not those the checkpoint was packed beside.
        quant.QuantError: the folder lacks a part, or a packed checkpoint cannot be read.
    """
    folder, packed = config.model.path, [mode.packed for mode in config.modes]
    if quant.has_transformer_weights(folder) or None in packed:
        return quant.model_fingerprint(folder)
    assert packed[0] is not None, "a configuration has at least one mode"
    info = quant.open_packed(packed[0], model_folder=folder).info
    parts = quant.parts_fingerprint(folder)
    if parts != info.parts_fingerprint:
        raise ModelUnusable(
            f"Tokenizer, text encoder, VAE and scheduler in {folder} ({parts}) are not those that "
            f"{packed[0]} was packed beside ({info.parts_fingerprint}); give the folder it was "
            f"made from, or pack this model."
        )
    return info.model_fingerprint


def plan_modes(config: WorkerConfig, fingerprint: str) -> list[ModePlan]:
    """Read every mode's recipe and scales and check that they fit the model.

    Raises:
        quant.ScalesMismatch, quant.PackedMismatch: the sentence ends with the command that makes
            fitting ones.
        quant.QuantError: a recipe, a scales file or a packed checkpoint cannot be read, or a tensor
            in it is not as it should be.
    """
    shape = BlockShape.of(shared_meta_model(read_transformer_config(config.model.path)).config)
    plans = []
    for mode in config.modes:
        if mode.recipe is None:
            plans.append(ModePlan(mode, shape, None, None))
            continue
        recipe = quant.QuantRecipe.load(mode.recipe)
        if mode.packed is not None:
            packed = quant.open_packed(mode.packed, model_folder=config.model.path, recipe=recipe)
            quant.check_packed(
                packed,
                model_fingerprint=fingerprint,
                recipe=recipe,
                model_folder=config.model.path,
            )
            plans.append(ModePlan(mode, shape, recipe, packed.scales, packed))
            continue
        assert mode.scales is not None, "the configuration has checked that"
        scales = quant.load_scales(mode.scales, model_folder=config.model.path, recipe=recipe)
        quant.check_scales(
            scales,
            model_fingerprint=fingerprint,
            recipe=recipe,
            path=mode.scales,
            model_folder=config.model.path,
        )
        plans.append(ModePlan(mode, shape, recipe, scales))
    return plans


def choose_kernels(plans: list[ModePlan], device: Device) -> KernelsByMode:
    """Try which kernels the modes run on here, before any weights are read.

    Beside, what will read them is made ready.

    Raises:
        ModelUnusable, quant.QuantError: a recipe wants what the device does not run.
    """
    _refuse_fp8_attention(plans, device)
    with ThreadPoolExecutor(1) as beside:
        ready = beside.submit(quant.TensorReader(device.torch_device).prepare)
        choices = {plan.config.made_with: _kernels_of(plan, device) for plan in distinct(plans)}
    ready.result()
    _warn(plans, choices)
    return choices


def _warn(plans: list[ModePlan], choices: KernelsByMode) -> None:
    """Say once of each warning which modes it is of."""
    modes: dict[str, list[str]] = {}
    for plan in plans:
        choice = choices[plan.config.made_with]
        if choice is not None and choice.warning is not None:
            modes.setdefault(choice.warning, []).append(plan.config.name)
    for warning, names in modes.items():
        logger.warning("%s: %s", ", ".join(names), warning)


def distinct(plans: list[ModePlan]) -> list[ModePlan]:
    """The first of each kind."""
    first: dict[tuple[object, ...], ModePlan] = {}
    for plan in plans:
        first.setdefault(plan.config.made_with, plan)
    return list(first.values())


def _refuse_fp8_attention(plans: list[ModePlan], device: Device) -> None:
    """Refuse FP8 attention where blocks run as diffusers has them: it would silently be BF16."""
    wanting = [p for p in plans if p.recipe is not None and p.recipe.attention_inputs]
    # Emulated, every device with kernels runs it.
    if wanting and device.pick_kernels(quantized=True, emulate=True) is None:
        raise ModelUnusable(
            f"Mode {wanting[0].config.name!r} has the recipe {wanting[0].config.recipe!r} with FP8 "
            f"attention, which {device.name} does not run; take a recipe with BF16 attention."
        )


def _kernels_of(plan: ModePlan, device: Device) -> KernelChoice | None:
    quantized = plan.recipe is not None
    return device.pick_kernels(
        quantized=quantized,
        shape=plan.shape,
        scales_rows=plan.recipe is not None and plan.recipe.scales_rows,
        fp8_attention=plan.recipe is not None and bool(plan.recipe.attention_inputs),
        emulate=plan.config.exact_emulation and quantized,
    )


def check_folder(path: Path) -> None:
    """Refuse a folder that is not a whole Wan2.1 text-to-video pipeline.

    Raises:
        ModelUnusable: naming what is missing or different.
    """
    missing = [part for part in _PARTS if not (path / part).exists()]
    if missing:
        raise ModelUnusable(
            f"The model folder {path} lacks {', '.join(missing)}; it has to be a diffusers folder "
            f"as WanPipeline.save_pretrained writes it."
        )
    try:
        index = json.loads((path / "model_index.json").read_text(encoding="utf-8"))
        second = (index.get("transformer_2") or [None])[0]
        scheduler = index["scheduler"][1]
    except (OSError, ValueError, LookupError, AttributeError, TypeError) as error:
        raise ModelUnusable(f"{path / 'model_index.json'} cannot be read: {error!r}.") from error
    if index.get("_class_name") != "WanPipeline" or second is not None:
        raise ModelUnusable(
            f"{path} holds a {index.get('_class_name')}"
            f"{' with two transformers' if second is not None else ''}; this worker "
            f"runs Wan2.1 text-to-video, a WanPipeline with one transformer."
        )
    if not hasattr(diffusers, str(scheduler)):
        raise ModelUnusable(f"{path} names the scheduler {scheduler}, which this diffusers lacks.")
