"""Read and check each mode's recipe and scales, and choose its kernels, before reading weights.

Every check that is possible without weights happens here: the recipes, and whether each scales file
and packed checkpoint was made for this model and recipe.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import diffusers

import quant
from jobs.catalog import ModeOffer
from quant.kernels.selection import KernelChoice
from quant.kernels.self_test import BlockShape
from quant.transformer.lora.merge import NO_LORAS
from quant.transformer.meta_model import (
    shared_meta_model,
)
from quant.weights.fingerprint import read_transformer_config, without_loras
from quant.weights.model_folder import check_model_kind
from worker.config import LoraConfig, ModeConfig, ModelConfig, WorkerConfig
from worker.device import Device
from worker.errors import ModelUnusable
from worker.model_loader.scheduler import shift_for

logger = logging.getLogger(__name__)

_REQUIRED_FILES = (
    "model_index.json",
    "tokenizer",
    "text_encoder/config.json",
    "transformer/config.json",
    "vae/config.json",
    "scheduler/scheduler_config.json",
)


KernelsByMode = dict[tuple[object, ...], KernelChoice]
"""The kernels of each distinct transformer, by `ModeConfig.transformer_key`."""


@dataclass(frozen=True, slots=True)
class ModePlan:
    """One mode's recipe and scales, read and checked.

    Attributes:
        shape: the shape of the model's blocks.
        recipe, scales: None for BF16.
        packed: the packed checkpoint that holds the mode's transformer, if there is one.
        loras: read and checked against the transformer's configuration.
    """

    config: ModeConfig
    shape: BlockShape
    recipe: quant.QuantRecipe | None
    scales: quant.Scales | None
    packed: quant.PackedCheckpoint | None = None
    loras: quant.LoraSet = NO_LORAS

    @property
    def variant(self) -> str | None:
        """What changes the frames besides recipe and scales; None if nothing does."""
        lora = [] if self.loras.digest is None else [f"lora:{self.loras.digest[:12]}"]
        return "+".join([*lora, *filter(None, [self.config.variant])]) or None

    def offer(self) -> ModeOffer:
        """Build what callers see; of a job with sparse attention, one step at least is sparse."""
        offer = self.config.offer()
        if self.recipe is None or self.recipe.sparse is None:
            return offer
        least = max(offer.min_steps or 1, self.recipe.sparse.dense_steps + 1)
        return offer.model_copy(update={"min_steps": least})


def fingerprint_model(config: WorkerConfig) -> str:
    """Compute the model's fingerprint, or take it from a packed checkpoint.

    A packed checkpoint serves if the model's other components are those it was packed with. The
    transformer's own weights are needed only if a mode runs or quantizes them.

    Raises:
        ModelUnusable: the folder's other components are not those the checkpoint was packed with.
        quant.QuantError: the folder lacks a component, or a packed checkpoint cannot be read.
    """
    folder, packed = config.model.path, [mode.packed for mode in config.modes]
    if quant.has_transformer_weights(folder) or None in packed:
        return quant.model_fingerprint(folder)
    assert packed[0] is not None, "a configuration has at least one mode"
    info = quant.open_packed(packed[0], model_folder=folder).info
    components = quant.parts_fingerprint(folder)
    if components != info.parts_fingerprint:
        raise ModelUnusable(
            f"Tokenizer, text encoder, VAE and scheduler in {folder} ({components}) are not those "
            f"that {packed[0]} was packed beside ({info.parts_fingerprint}); give the folder it "
            f"was made from, or pack this model."
        )
    return without_loras(info.model_fingerprint)


def plan_modes(config: WorkerConfig, fingerprint: str) -> list[ModePlan]:
    """Read every mode's recipe, scales and LoRAs and check that they fit the model.

    Args:
        fingerprint: of the model without LoRAs.

    Raises:
        quant.ScalesMismatch, quant.PackedMismatch: the message ends with the command that makes
            matching ones.
        quant.QuantError: a recipe, a LoRA, a scales file or a packed checkpoint cannot be read, or
            one of its tensors is missing, has no place or has a wrong shape or type.
    """
    loras = read_mode_loras(config)
    shape = BlockShape.of(shared_meta_model(read_transformer_config(config.model.path)).config)
    return [
        _plan_mode(config.model, mode, shape, fingerprint, loras[mode.lora])
        for mode in config.modes
    ]


def read_mode_loras(config: WorkerConfig) -> dict[tuple[LoraConfig, ...], quant.LoraSet]:
    """Read the LoRAs of every mode, by what the mode says of them; modes with the same share them.

    Raises:
        quant.QuantError: one cannot be read, or does not fit the model.
    """
    return {
        entries: quant.read_loras(
            config.model.path, [quant.LoraSource(each.path, each.scale) for each in entries]
        )
        for entries in {mode.lora for mode in config.modes}
    }


def _plan_mode(
    model: ModelConfig,
    mode: ModeConfig,
    shape: BlockShape,
    fingerprint: str,
    loras: quant.LoraSet,
) -> ModePlan:
    """Read one mode's recipe and scales and check that they fit the model with its LoRAs."""
    if mode.recipe is None:
        return ModePlan(mode, shape, None, None, None, loras)
    recipe, packed = quant.QuantRecipe.load(mode.recipe), None
    merged, arguments = loras.fingerprint(fingerprint), loras.arguments
    sampling = _sampling_arguments(model, mode)
    if mode.packed is not None:
        packed = quant.open_packed(
            mode.packed, model_folder=model.path, recipe=recipe, loras=arguments
        )
        scales = packed.scales
        recipe = quant.check_packed(
            packed,
            model_fingerprint=merged,
            recipe=recipe,
            model_folder=model.path,
            loras=arguments,
        )
    else:
        assert mode.scales is not None, "ModeConfig has checked that"
        scales = quant.load_scales(
            mode.scales,
            model_folder=model.path,
            recipe=recipe,
            loras=arguments,
            sampling=sampling,
        )
        recipe = quant.check_scales(
            scales,
            model_fingerprint=merged,
            recipe=recipe,
            path=mode.scales,
            model_folder=model.path,
            loras=arguments,
            sampling=sampling,
        )
    _warn_of_other_sampling(model, mode, scales)
    return ModePlan(mode, shape, recipe, scales, packed, loras)


def _sampling_arguments(model: ModelConfig, mode: ModeConfig) -> list[str]:
    """Return the arguments of `quant calibrate` by which a mode of its own terms is sampled."""
    terms = model.offer(fingerprint="unread").terms(mode)
    found = []
    if mode.own:
        found += ["--steps", str(terms.default_steps)]
        found += ["--guidance-scale", f"{terms.default_guidance_scale:g}"]
    if mode.flow_shift is not None:
        shift = shift_for(model.default_size, mode.flow_shift, model.flow_shift)
        found += [] if shift is None else ["--flow-shift", f"{shift:g}"]
    return found


def _warn_of_other_sampling(model: ModelConfig, mode: ModeConfig, scales: quant.Scales) -> None:
    """Log if scales were calibrated with guidance, a negative prompt or a shift not served so.

    Callers may choose both size and negative prompt, so that this is no reason to refuse. Steps are
    not compared, nor a shift that is the model's own where the mode has none.
    """
    sampler = scales.sampler
    if sampler is None:
        return
    terms, found = model.offer(fingerprint="unread").terms(mode), []
    if sampler.guidance_scale > terms.max_guidance_scale:
        found.append(f"guidance ({sampler.guidance_scale:g})")
    elif sampler.guidance_scale > 1 and sampler.negative_prompt != model.default_negative_prompt:
        found.append("negative prompt")
    served = [shift_for(size, mode.flow_shift, model.flow_shift) for size in model.sizes]
    if sampler.flow_shift is not None and sampler.flow_shift not in served:
        found.append(f"flow shift ({sampler.flow_shift:g})")
    elif sampler.flow_shift is None and mode.flow_shift is not None:
        found.append("flow shift (the model's own)")
    if found:
        of_model = not mode.own and mode.flow_shift is None
        logger.warning(
            "%s: its scales were calibrated with another %s than is served by default; to "
            "calibrate as the service samples, give `python -m quant calibrate` %s",
            mode.name,
            " and ".join(found),
            "--config" + ("" if of_model else ", --steps, --guidance-scale and --flow-shift"),
        )


def choose_kernels(plans: list[ModePlan], device: Device) -> KernelsByMode:
    """Find out by trial which kernels the modes run on here, before reading weights.

    Meanwhile another thread prepares the reader of the weights.

    Raises:
        ModelUnusable, quant.QuantError: a recipe needs something that the device does not run.
    """
    _refuse_attention(plans, device)
    with ThreadPoolExecutor(1) as executor:
        prepared = executor.submit(quant.TensorReader(device.torch_device).prepare)
        kernels = {
            plan.config.transformer_key: kernels_of(plan, device) for plan in distinct_plans(plans)
        }
    prepared.result()
    _warn(plans, kernels)
    return kernels


def _warn(plans: list[ModePlan], kernels: KernelsByMode) -> None:
    """Log each warning once, with the names of its modes."""
    modes: dict[str, list[str]] = {}
    for plan in plans:
        choice = kernels[plan.config.transformer_key]
        if choice.warning is not None:
            modes.setdefault(choice.warning, []).append(plan.config.name)
    for warning, names in modes.items():
        logger.warning("%s: %s", ", ".join(names), warning)


def distinct_plans(plans: list[ModePlan]) -> list[ModePlan]:
    """Return one plan for each distinct transformer: the first."""
    return _first_of_each(plans, lambda plan: plan.config.transformer_key)


def distinct_weights(plans: list[ModePlan]) -> list[ModePlan]:
    """Return one plan for each distinct set of weights: the first."""
    return _first_of_each(plans, lambda plan: plan.config.weights_key)


def _first_of_each(
    plans: list[ModePlan], key: Callable[[ModePlan], tuple[object, ...]]
) -> list[ModePlan]:
    first: dict[tuple[object, ...], ModePlan] = {}
    for plan in plans:
        first.setdefault(key(plan), plan)
    return list(first.values())


def _refuse_attention(plans: list[ModePlan], device: Device) -> None:
    """Refuse FP8 and sparse attention on a device that does not even emulate them."""
    for plan in plans:
        if plan.recipe is None or plan.recipe.attention == "bf16" or device.attends_otherwise:
            continue
        name = {"fp8": "FP8", "sparse": "sparse"}[plan.recipe.attention]
        raise ModelUnusable(
            f"Mode {plan.config.name!r} has the recipe {plan.config.recipe!r} with {name} "
            f"attention, which {device.name} does not run; take a recipe with attention 'bf16'."
        )


def kernels_of(plan: ModePlan, device: Device) -> KernelChoice:
    """Find out by trial which kernels a mode runs on here."""
    number_format = None if plan.recipe is None else plan.recipe.format
    quantized = number_format == "hif8"
    sparse = None if plan.recipe is None else plan.recipe.sparse
    return device.pick_kernels(
        quantized=quantized,
        shape=plan.shape,
        per_row_scales=plan.recipe is not None and plan.recipe.per_row_scales,
        fp8_attention=plan.recipe is not None and bool(plan.recipe.attention_inputs),
        int8=number_format == "int8",
        sparse_block=None if sparse is None else sparse.block,
        emulate=plan.config.exact_emulation,
    )


def check_folder(path: Path) -> None:
    """Refuse a folder that is not a complete Wan2.1 text-to-video pipeline.

    Raises:
        ModelUnusable: names what is missing or different.
    """
    try:
        check_model_kind(path)
    except quant.WeightsError as error:
        raise ModelUnusable(str(error)) from error
    missing = [name for name in _REQUIRED_FILES if not (path / name).exists()]
    if missing:
        raise ModelUnusable(
            f"The model folder {path} lacks {', '.join(missing)}; it has to be a diffusers folder "
            f"as WanPipeline.save_pretrained writes it."
        )
    try:
        index = json.loads((path / "model_index.json").read_text(encoding="utf-8"))
        scheduler = index["scheduler"][1]
    except (OSError, ValueError, LookupError, AttributeError, TypeError) as error:
        raise ModelUnusable(f"{path / 'model_index.json'} cannot be read: {error!r}.") from error
    if not hasattr(diffusers, str(scheduler)):
        raise ModelUnusable(f"{path} names the scheduler {scheduler}, which this diffusers lacks.")
