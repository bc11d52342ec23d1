"""From a diffusers folder and a configuration to what an engine holds: shared parts and modes.

Everything that can be refused is refused before the large tensors are read: the recipes, whether
each scales file and packed checkpoint was made for this model and recipe, whether all of it fits.
Only faults of text encoder, VAE, tokenizer and scheduler may be found while first weights are under
way, and where a mode is quantized here, those of the transformer; the rest is then not read.

Weights go from their files straight to the device (`quant.weights.reader`). What is materialised
where, with the transformer's bytes as the measure:
- `bf16` alone: the BF16 transformer, on the device.
- `bf16` with quantized modes, or several quantized ones with scales: the BF16 transformer on the
  device, then each quantized one beside it, read if it is packed and otherwise made there. They
  share every tensor that is not quantized, because neither tree is moved afterwards.
- Packed modes only: their transformers on the device and nothing else, anywhere. Several share what
  none of them quantizes. The model's own transformer weights need not be there.
- One quantized mode with scales alone: the BF16 transformer on the host only, until it is
  converted; the device sees the quantized one only. The BF16 blocks' memory on the host is then
  returned.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from torch import nn

import quant
from jobs.catalog import ModeOffer
from quant.kernels.eager import EagerKernels
from quant.kernels.selection import KernelChoice
from quant.transformer.meta_model import (
    check_stored,
    empty_transformer,
    load_weights,
    move_buffers,
)
from quant.weights.header import stored_tensors
from worker.config import StepCache
from worker.device import Device
from worker.model_loader.component_files import WEIGHTS, check_files, read_json
from worker.model_loader.components import ComponentLoader, Components
from worker.model_loader.memory_plan import Placement
from worker.model_loader.mode_plan import (
    KernelsByMode,
    ModePlan,
    choose_kernels,
    distinct,
)
from worker.model_loader.tokenizer import ModelTokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Mode:
    """One transformer, ready to run.

    Attributes:
        report: what was converted; None where nothing was.
    """

    offer: ModeOffer
    transformer: WanTransformer3DModel
    report: str | None
    weight_bytes: int
    step_cache: StepCache | None = None


def load_modes(
    path: Path, plans: list[ModePlan], device: Device, choices: KernelsByMode | None = None
) -> tuple[Mode, ...]:
    """Load or make the transformer of every planned mode; `path` is the model's folder.

    Modes that differ in nothing a transformer is made with share one.

    Args:
        choices: of `choose_kernels`, by default made here.

    Raises:
        ModelUnusable: a recipe wants what the device does not run.
        quant.QuantError: a recipe does not fit, or a tensor is not as it should be.
    """
    if choices is None:
        choices = choose_kernels(plans, device)
    with quant.BackgroundReader(quant.TensorReader(device.torch_device)) as beside:
        begun = _begin_modes(path, plans, device, beside)
        return _finish_modes(begun, plans, choices, device, beside)


def load_model(
    path: Path,
    plans: list[ModePlan],
    device: Device,
    placement: Placement | None = None,
    choices: KernelsByMode | None = None,
    tokenizer: Callable[[], ModelTokenizer] | None = None,
) -> tuple[tuple[Mode, ...], Components]:
    """Load the modes and what they share: a thread copies, while this one makes modules.

    Args:
        placement: what goes where; by default everything to the device.
        choices: of `choose_kernels`, by default made here.
        tokenizer: gives the one that somebody else is reading; by default it is read here.

    Raises:
        ModelUnusable, quant.QuantError: a part is missing, or a file or tensor is not as it should
            be.
    """
    if choices is None:
        choices = choose_kernels(plans, device)
    home = None if placement is None else placement.text_encoder_home(device)
    with quant.BackgroundReader(quant.TensorReader(device.torch_device)) as beside:

        def begin_shared() -> ComponentLoader:
            shared = ComponentLoader(path, device, home)
            shared.copy(beside)
            return shared

        # To make their modules takes time in which the transformer can be read already. But where
        # it is quantized here, that is waited for, and a fault of theirs should not have to.
        first = begin_shared() if any(map(_quantizes, plans)) else None
        begun = _begin_modes(path, plans, device, beside)
        parts = (first or begin_shared()).finish(tokenizer)
        modes = _finish_modes(begun, plans, choices, device, beside)
    if placement is not None:
        parts = replace(
            parts,
            text_encoder_place=placement.text_encoder,
            vae_tiling=placement.vae_tiling,
        )
    return modes, parts


def _quantizes(plan: ModePlan) -> bool:
    """Whether its transformer is quantized here, rather than read as it is."""
    return plan.packed is None and plan.scales is not None


def _begin_modes(
    path: Path, plans: list[ModePlan], device: Device, reader: quant.BackgroundReader
) -> tuple[Mode, ...]:
    """Make the distinct modes' trees; what is in them may still be on its way."""
    plans = distinct(plans)
    packed = [plan.packed for plan in plans if plan.packed is not None]
    base = None
    if len(packed) < len(plans):
        convert_first = len(plans) == 1 and plans[0].recipe is not None
        host = quant.TensorReader(torch.device("cpu"))
        base = _load_bf16(path / "transformer", device, host if convert_first else reader)
    elif len(packed) > 1:
        base = quant.load_packed_base(packed, reader)
    return tuple(_make_mode(plan, base, reader) for plan in plans)


def _finish_modes(
    begun: tuple[Mode, ...],
    plans: list[ModePlan],
    choices: KernelsByMode,
    device: Device,
    reader: quant.BackgroundReader,
) -> tuple[Mode, ...]:
    """Put modes on their kernels, block by block as their weights arrive.

    It comes after all trees have been made, as they share.
    """
    for mode in begun:
        if mode.transformer.device != device.torch_device:  # it was quantized on the host
            mode.transformer.to(device.torch_device)
    made = {
        plan.config.made_with: _put_on_kernels(
            mode, plan, choices[plan.config.made_with], device, reader
        )
        for mode, plan in zip(begun, distinct(plans), strict=True)
    }
    return tuple(_as_mode(plan, made[plan.config.made_with]) for plan in plans)


def _put_on_kernels(
    mode: Mode,
    plan: ModePlan,
    choice: KernelChoice | None,
    device: Device,
    reader: quant.BackgroundReader,
) -> Mode:
    """Have a mode's blocks run on the kernels that were chosen for it."""
    if choice is None:
        if device.attention_backend is not None:
            mode.transformer.set_attention_backend(device.attention_backend)
        return mode
    attention = {}
    if plan.recipe is not None and plan.scales is not None:
        attention = quant.attention_scales(plan.recipe, plan.scales)

    def wait_for(block: nn.Module) -> None:
        reader.wait_for(block.state_dict(keep_vars=True).values())

    left = quant.fuse_quantized(mode.transformer, choice.kernels, attention, wait_for)
    warning = choice.warning
    if left and choice.kernels.name != EagerKernels.name:
        warning = (
            f"{len(left)} of {len(mode.transformer.blocks)} blocks run in plain torch, which is "
            f"slower than bf16: the recipe {plan.config.recipe!r} rounds each token on its own, or "
            "quantizes only some of the linears that share an input."
        )
        logger.warning("%s: %s", mode.offer.name, warning)
    offer = mode.offer.model_copy(update={"kernels": choice.kernels.name, "warning": warning})
    return replace(mode, offer=offer)


def _load_bf16(folder: Path, device: Device, reader: quant.Reader) -> WanTransformer3DModel:
    check_files(folder, WEIGHTS)
    transformer = empty_transformer(read_json(folder / "config.json"), device.dtype)
    stored = stored_tensors(sorted(folder.glob(WEIGHTS)))
    check_stored(transformer.state_dict(), stored, source=str(folder), exact=False)
    return move_buffers(load_weights(transformer, stored, reader), reader.device)


def _make_mode(
    plan: ModePlan, base: WanTransformer3DModel | None, reader: quant.BackgroundReader
) -> Mode:
    """Make one mode beside `base`, or from its packed checkpoint alone where there is none."""
    transformer, report = base, None
    if plan.packed is not None:
        transformer = (
            quant.load_packed(plan.packed, reader)
            if base is None
            else quant.load_packed_beside(plan.packed, base, reader)
        )
        report = f"packed in {plan.packed.folder}, {plan.packed.linears} linears quantized"
    elif base is not None and plan.recipe is not None and plan.scales is not None:
        reader.wait()  # what is quantized has to be there
        transformer, conversion = quant.quantize_transformer(base, plan.recipe, plan.scales)
        logger.debug("mode %s:\n%s", plan.config.name, conversion.table())
        report = str(conversion).splitlines()[0]
    assert transformer is not None, "a mode that is not packed has a BF16 transformer to go with"
    recipe_fingerprint = None if plan.recipe is None else plan.recipe.fingerprint
    offer = ModeOffer(
        name=plan.config.name,
        description=plan.config.description,
        recipe_fingerprint=recipe_fingerprint,
    )
    weight_bytes = quant.weight_bytes(transformer)
    return Mode(offer, transformer.eval(), report, weight_bytes)


def _as_mode(plan: ModePlan, made: Mode) -> Mode:
    """The planned mode, whose transformer was made for the first of its kind."""
    config = plan.config
    own = {"name": config.name, "description": config.description, "variant": config.variant}
    return replace(made, offer=made.offer.model_copy(update=own), step_cache=plan.config.step_cache)
