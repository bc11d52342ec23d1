"""Load a model from a diffusers folder: the shared components, and each mode's transformer.

Every check that is possible without the large tensors runs before they are read: the recipes,
whether each scales file and packed checkpoint was made for this model and recipe, and whether
everything fits in memory. Faults of text encoder, VAE, tokenizer and scheduler may be found while
the first weights are being read; where a mode is quantized here, also faults of the transformer.
The remaining weights are then not read.

Weights go from their files directly to the device (`quant.weights.reader`). Which transformers are
in memory:
- `bf16` alone: the BF16 transformer, on the device.
- `bf16` with quantized modes, or several quantized modes with scales: the BF16 transformer on the
  device, and each quantized one as well, read if it is packed and otherwise quantized there. They
  share every tensor that is not quantized, because none of them is moved afterwards.
- Packed modes only: their transformers on the device and nothing else. Several share the tensors
  that none of them quantizes. The model's own transformer weights need not exist.
- Quantized modes that name the same scales or the same packed checkpoint: their recipes differ in
  attention only, so all their weights are shared, also as the kernels hold them.
- A single quantized mode with scales: the BF16 transformer on the host until it is quantized; the
  device gets only the quantized one. The BF16 blocks' host memory is freed afterwards.

LoRAs are merged into the BF16 transformer before anything is quantized. If all modes have the same,
they are merged in place. Otherwise modes with the same LoRAs have copies of the tensors that these
change, and share all other tensors with the modes that have others or none.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from torch import nn

import quant
from jobs.catalog import ModeOffer
from quant.kernels.eager import EagerKernels
from quant.kernels.interface import AttentionScales
from quant.kernels.selection import KernelChoice
from quant.transformer.meta_model import (
    check_stored,
    empty_transformer,
    load_weights,
    move_buffers,
)
from quant.transformer.module_tree import share_except
from quant.transformer.wan_block import FusedWanBlock
from quant.weights.weight_files import stored_weights
from worker.config import LoraConfig, ModeShift, SchedulerName, StepCache
from worker.device import Device
from worker.model_loader.component_files import WEIGHTS, check_files, read_json
from worker.model_loader.components import ComponentLoader, Components
from worker.model_loader.memory_plan import Placement, multiplies_decoded
from worker.model_loader.mode_plan import (
    KernelsByMode,
    ModePlan,
    choose_kernels,
    distinct_plans,
    distinct_weights,
)
from worker.model_loader.tokenizer import ModelTokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Mode:
    """One mode's transformer, ready to run.

    Attributes:
        conversion: one line that says what was merged and quantized; None if nothing was.
        weight_bytes: of the transformer, including the tensors it shares.
        flow_shift: in place of the model's.
        scheduler: in place of the model's own.
    """

    offer: ModeOffer
    transformer: WanTransformer3DModel
    conversion: str | None
    weight_bytes: int
    step_cache: StepCache | None = None
    flow_shift: ModeShift | None = None
    scheduler: SchedulerName | None = None


def load_modes(
    path: Path,
    plans: list[ModePlan],
    device: Device,
    kernels: KernelsByMode | None = None,
    weight_storage: quant.WeightStorage = "packed",
) -> tuple[Mode, ...]:
    """Load or quantize the transformer of every planned mode.

    Modes with equal `ModeConfig.transformer_key` share one transformer.

    Args:
        path: the model's folder.
        kernels: the result of `choose_kernels`; by default it is called here.
        weight_storage: of the modes that `multiplies_decoded`.

    Raises:
        ModelUnusable: a recipe needs something that the device does not run.
        quant.QuantError: a recipe does not fit the model, or a tensor is missing or has a wrong
            shape or type.
    """
    if kernels is None:
        kernels = choose_kernels(plans, device)
    with quant.BackgroundReader(quant.TensorReader(device.torch_device)) as background:
        built = _build_modes(path, distinct_weights(plans), device, background)
        return _fuse_modes(built, plans, kernels, device, background, weight_storage)


def load_model(
    path: Path,
    plans: list[ModePlan],
    device: Device,
    placement: Placement | None = None,
    kernels: KernelsByMode | None = None,
    tokenizer: Callable[[], ModelTokenizer] | None = None,
) -> tuple[tuple[Mode, ...], Components]:
    """Load modes and shared components: another thread copies weights while this one makes modules.

    Args:
        path: the model's folder.
        placement: where the text encoder goes, and how weights are held; by default everything is
            on the device, and packed.
        kernels: the result of `choose_kernels`; by default it is called here.
        tokenizer: returns the tokenizer that another thread reads; by default it is read here.

    Raises:
        ModelUnusable, quant.QuantError: a component is missing, or a file or tensor is damaged.
    """
    if kernels is None:
        kernels = choose_kernels(plans, device)
    encoder_device = None if placement is None else placement.text_encoder_load_device(device)
    with quant.BackgroundReader(quant.TensorReader(device.torch_device)) as background:

        def start_components() -> ComponentLoader:
            component_loader = ComponentLoader(path, device, encoder_device)
            component_loader.copy(background)
            return component_loader

        # Normally the transformer comes first, so that it is read while the components' modules are
        # made. But merging and quantizing wait until it is read, so then the components come first,
        # and their faults are found before that wait.
        started = start_components() if any(map(_waits_for_weights, plans)) else None
        built = _build_modes(path, distinct_weights(plans), device, background)
        components = (started or start_components()).finish(tokenizer)
        storage = "packed" if placement is None else placement.weight_storage
        modes = _fuse_modes(built, plans, kernels, device, background, storage)
    if placement is not None:
        components = replace(
            components,
            text_encoder_placement=placement.text_encoder,
            vae_tiling=placement.vae_tiling,
        )
    return modes, components


def _waits_for_weights(plan: ModePlan) -> bool:
    """Return whether the transformer is merged or quantized here, rather than read as it is."""
    return plan.packed is None and (plan.scales is not None or bool(plan.loras.names))


def _build_modes(
    path: Path, plans: list[ModePlan], device: Device, reader: quant.BackgroundReader
) -> tuple[Mode, ...]:
    """Make the module trees of modes of distinct weights, which may still be being read."""
    groups: dict[tuple[LoraConfig, ...], list[ModePlan]] = {}
    for plan in plans:
        groups.setdefault(plan.config.lora, []).append(plan)
    common: WanTransformer3DModel | None = None
    if not all(plan.packed for plan in plans):
        quantize_on_host = len(plans) == 1 and plans[0].recipe is not None
        host = quant.TensorReader(torch.device("cpu"))
        common = _load_bf16(path / "transformer", device, host if quantize_on_host else reader)
    elif len(plans) > 1:
        for group in groups.values():
            leave = group[0].loras.names if len(groups) > 1 else ()
            common = quant.load_packed_base(_packed(group), reader, base=common, leave=leave)
    bases = {
        key: None if common is None else _base_of(group, common, reader, alone=len(groups) == 1)
        for key, group in groups.items()
    }
    return tuple(_make_mode(plan, bases[plan.config.lora], reader) for plan in plans)


def _base_of(
    group: list[ModePlan],
    common: WanTransformer3DModel,
    reader: quant.BackgroundReader,
    *,
    alone: bool,
) -> WanTransformer3DModel:
    """Return the BF16 tree whose tensors the modes of a group share, which have the same LoRAs.

    Args:
        common: the tree whose tensors all modes share, without LoRAs.
        alone: whether there are no modes with other LoRAs or none.
    """
    loras, packed = group[0].loras, _packed(group)
    if not loras.names or (alone and len(packed) == len(group)):
        return common
    base = common if alone else share_except(common, loras.names)
    if len(packed) == len(group):
        return quant.load_packed_base(packed, reader, base=base)
    reader.wait()  # merging needs the weights
    loras.merge(common, base)
    return base


def _packed(group: list[ModePlan]) -> list[quant.PackedCheckpoint]:
    return [plan.packed for plan in group if plan.packed is not None]


def _fuse_modes(
    built: tuple[Mode, ...],
    plans: list[ModePlan],
    kernels: KernelsByMode,
    device: Device,
    reader: quant.BackgroundReader,
    weight_storage: quant.WeightStorage,
) -> tuple[Mode, ...]:
    """Put modes on their kernels, block by block as their weights arrive.

    This must follow the making of all module trees, because they share tensors.
    """
    for mode in built:
        if mode.transformer.device != device.torch_device:  # it was quantized on the host
            mode.transformer.to(device.torch_device)
    of_weights = {
        plan.config.weights_key: mode
        for mode, plan in zip(built, distinct_weights(plans), strict=True)
    }
    fused: dict[tuple[object, ...], Mode] = {}
    for plan in distinct_plans(plans):
        key, weights = plan.config.transformer_key, plan.config.weights_key
        mode, choice = of_weights[weights], kernels[key]
        if mode.offer.kernels is None:
            mode = _put_on_kernels(mode, plan, choice, device, reader, weight_storage)
            of_weights[weights] = mode
        else:
            mode = _share_fused(mode, plan, choice)
        fused[key] = _with_kernels_shown(mode, plan, choice)
    # Not before all have been shared: what it attaches belongs to one of them.
    for plan in distinct_plans(plans):
        if plan.recipe is not None:
            quant.apply_attention(fused[plan.config.transformer_key].transformer, plan.recipe)
    return tuple(_as_mode(plan, fused[plan.config.transformer_key]) for plan in plans)


def _put_on_kernels(
    mode: Mode,
    plan: ModePlan,
    choice: KernelChoice,
    device: Device,
    reader: quant.BackgroundReader,
    weight_storage: quant.WeightStorage,
) -> Mode:
    """Replace a mode's blocks by fused ones that run on the chosen kernels."""
    decodes = weight_storage == "bf16_grid" and multiplies_decoded(plan.config, plan.recipe, device)
    if decodes and not quant.reads_decoded(choice.kernels, device.torch_device):
        logger.info(
            "%s: weights stay packed, because %s kernels multiply the codes themselves",
            mode.offer.name,
            choice.kernels.name,
        )
        decodes = False

    def wait_for(block: nn.Module) -> None:
        reader.wait_for(block.state_dict(keep_vars=True).values())
        if decodes:
            quant.decode_weights(block)

    attention = _attention_scales(plan)
    unfused = quant.fuse_quantized(mode.transformer, choice.kernels, attention, wait_for)
    if unfused and device.attention_backend is not None:
        mode.transformer.set_attention_backend(device.attention_backend)
    offer = mode.offer.model_copy(update={"kernels": choice.kernels.name})
    weight_bytes = quant.weight_bytes(mode.transformer) if decodes else mode.weight_bytes
    return replace(mode, offer=offer, weight_bytes=weight_bytes)


def _share_fused(mode: Mode, plan: ModePlan, choice: KernelChoice) -> Mode:
    """Return the mode of a plan whose weights are all those of a mode that is on its kernels."""
    assert plan.recipe is not None, "modes in BF16 with equal weights have one transformer"
    return replace(
        mode,
        offer=plan.offer().model_copy(update={"recipe_fingerprint": plan.recipe.fingerprint}),
        transformer=quant.share_fused(mode.transformer, choice.kernels, _attention_scales(plan)),
        conversion=f"all weights shared with mode {mode.offer.name}",
    )


def _attention_scales(plan: ModePlan) -> Mapping[int, AttentionScales]:
    if plan.recipe is None or plan.scales is None:
        return {}
    return quant.attention_scales(plan.recipe, plan.scales)


def _with_kernels_shown(mode: Mode, plan: ModePlan, choice: KernelChoice) -> Mode:
    """Return a mode whose offer says which kernels it runs on, and why they are not the fastest."""
    blocks = mode.transformer.blocks
    unfused = sum(not isinstance(block, FusedWanBlock) for block in blocks)
    warnings = [choice.warning] if choice.warning else []
    if unfused and choice.kernels.name != EagerKernels.name:
        warning = (
            f"{unfused} of {len(blocks)} blocks run in plain torch, which is slower than bf16: the "
            f"recipe {plan.config.recipe!r} rounds each token on its own, or quantizes only some "
            "of the linears that share an input."
        )
        logger.warning("%s: %s", mode.offer.name, warning)
        warnings.append(warning)
    shown = {"kernels": choice.kernels.name, "warning": " ".join(warnings) or None}
    return replace(mode, offer=mode.offer.model_copy(update=shown))


def _load_bf16(folder: Path, device: Device, reader: quant.Reader) -> WanTransformer3DModel:
    check_files(folder, WEIGHTS)
    transformer = empty_transformer(read_json(folder / "config.json"), device.dtype)
    stored = stored_weights(folder)
    check_stored(transformer.state_dict(), stored, source=str(folder), exact=False)
    return move_buffers(load_weights(transformer, stored, reader), reader.device)


def _make_mode(
    plan: ModePlan, base: WanTransformer3DModel | None, reader: quant.BackgroundReader
) -> Mode:
    """Make one mode that shares tensors with `base`, or without one from its checkpoint alone."""
    transformer, conversion = base, None
    if plan.packed is not None:
        transformer = (
            quant.load_packed(plan.packed, reader)
            if base is None
            else quant.load_packed_shared(plan.packed, base, reader)
        )
        conversion = f"packed in {plan.packed.folder}, {plan.packed.linears} linears quantized"
    elif base is not None and plan.recipe is not None and plan.scales is not None:
        reader.wait()  # quantizing needs the weights
        transformer, report = quant.quantize_transformer(base, plan.recipe, plan.scales)
        logger.debug("mode %s:\n%s", plan.config.name, report.table())
        conversion = str(report).splitlines()[0]
    if plan.loras.loras:
        merged = f"LoRAs in {len(plan.loras.changed)} tensors: {', '.join(plan.loras.arguments)}"
        conversion = "; ".join(filter(None, [merged, conversion]))
    assert transformer is not None, "a mode that is not packed has a BF16 base"
    recipe_fingerprint = None if plan.recipe is None else plan.recipe.fingerprint
    offer = plan.offer().model_copy(update={"recipe_fingerprint": recipe_fingerprint})
    weight_bytes = quant.weight_bytes(transformer)
    return Mode(offer, transformer.eval(), conversion, weight_bytes)


def _as_mode(plan: ModePlan, first: Mode) -> Mode:
    """Return the planned mode with the transformer of the first mode of its key."""
    config = plan.config
    loaded = first.offer.model_dump(include={"recipe_fingerprint", "kernels", "warning"})
    return replace(
        first,
        offer=plan.offer().model_copy(update=loaded | {"variant": plan.variant}),
        step_cache=config.step_cache,
        flow_shift=config.flow_shift,
        scheduler=config.scheduler,
    )
