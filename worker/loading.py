"""From a diffusers folder and a configuration to what an engine holds: shared parts and modes.

Everything that can be refused is refused before the large tensors are read: the folder's parts, the
recipes, and whether each scales file was made for this model and recipe.

What is materialised where, with the transformer's bytes as the measure:
- `bf16` alone: the BF16 transformer, on the device.
- `bf16` with quantized modes, or several quantized ones: the BF16 transformer on the device, then
  each quantized one beside it, made there. They share every tensor that is not quantized, because
  neither tree is moved afterwards.
- One quantized mode alone: the BF16 transformer on the host only, until it is converted; the device
  sees the quantized one only. The BF16 blocks' memory on the host is then returned.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors import SafetensorError, safe_open
from transformers import AutoTokenizer, PreTrainedTokenizerBase, UMT5EncoderModel

import quant
from jobs.catalog import ModeOffer
from worker.config import ModeConfig, WorkerConfig
from worker.devices import Device
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
_CONFIG = "*config.json"
_WEIGHTS = "*.safetensors"


@dataclass(frozen=True, slots=True)
class SharedParts:
    """What all modes use. `scheduler` is a pattern: a run makes its own from its configuration."""

    tokenizer: PreTrainedTokenizerBase
    text_encoder: UMT5EncoderModel
    vae: AutoencoderKLWan
    scheduler: Any


@dataclass(frozen=True, slots=True)
class Mode:
    """One transformer, ready to run. `report` says what was converted, None where nothing was."""

    offer: ModeOffer
    transformer: WanTransformer3DModel
    report: str | None
    weight_bytes: int


@dataclass(frozen=True, slots=True)
class _Plan:
    """One mode's recipe and scales, read and found to fit; both None for BF16."""

    config: ModeConfig
    recipe: quant.QuantRecipe | None
    scales: quant.Scales | None


def plan_modes(config: WorkerConfig, fingerprint: str) -> list[_Plan]:
    """Read every mode's recipe and scales and check that they fit the model.

    Raises:
        quant.ScalesMismatch: its sentence ends with the command that makes fitting scales.
        quant.QuantError: a recipe or a scales file cannot be read.
    """
    plans = []
    for mode in config.modes:
        if mode.recipe is None or mode.scales is None:
            plans.append(_Plan(mode, None, None))
            continue
        recipe = quant.QuantRecipe.load(mode.recipe)
        scales = quant.load_scales(mode.scales, model_folder=config.model.path, recipe=recipe)
        quant.check_scales(
            scales,
            model_fingerprint=fingerprint,
            recipe=recipe,
            path=mode.scales,
            model_folder=config.model.path,
        )
        plans.append(_Plan(mode, recipe, scales))
    return plans


def load_modes(path: Path, plans: list[_Plan], device: Device) -> tuple[Mode, ...]:
    """Load the transformer below `path` once and make every planned mode of it."""
    bf16 = _read(WanTransformer3DModel.from_pretrained, path / "transformer", dtype=device.dtype)
    on_host = len(plans) == 1 and plans[0].recipe is not None
    if not on_host:
        bf16 = bf16.to(device.torch_device)
    modes = tuple(_make_mode(plan, bf16) for plan in plans)
    for mode in modes:
        if on_host:
            mode.transformer.to(device.torch_device)
        if device.attention_backend is not None:
            mode.transformer.set_attention_backend(device.attention_backend)
    return modes


def load_shared_parts(path: Path, device: Device) -> SharedParts:
    """Load tokenizer, text encoder, VAE and scheduler from the folder `path`."""
    index = json.loads((path / "model_index.json").read_text(encoding="utf-8"))
    scheduler = getattr(diffusers, index["scheduler"][1])
    text_encoder = _read(
        UMT5EncoderModel.from_pretrained, path / "text_encoder", dtype=device.dtype
    )
    vae = _read(AutoencoderKLWan.from_pretrained, path / "vae", dtype=device.vae_dtype)
    return SharedParts(
        tokenizer=_read(AutoTokenizer.from_pretrained, path / "tokenizer", "tokenizer.json"),
        text_encoder=text_encoder.eval().to(device.torch_device),
        vae=vae.eval().to(device.torch_device),
        scheduler=_read(scheduler.from_pretrained, path / "scheduler", _CONFIG),
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


def _make_mode(plan: _Plan, bf16: WanTransformer3DModel) -> Mode:
    transformer, report, recipe_fingerprint = bf16, None, None
    if plan.recipe is not None and plan.scales is not None:
        transformer, conversion = quant.quantize_transformer(bf16, plan.recipe, plan.scales)
        logger.debug("mode %s:\n%s", plan.config.name, conversion.table())
        report, recipe_fingerprint = str(conversion).splitlines()[0], plan.recipe.fingerprint
    offer = ModeOffer(
        name=plan.config.name,
        description=plan.config.description,
        recipe_fingerprint=recipe_fingerprint,
    )
    return Mode(offer, transformer.eval(), report, quant.weight_bytes(transformer))


def _read(load: Callable[..., Any], folder: Path, needed: str = _WEIGHTS, **options: Any) -> Any:
    """Call a `from_pretrained` on a local folder; nothing is downloaded or unpickled.

    `needed` is the pattern of the files that it cannot do without, beside a configuration.
    """
    if needed == _WEIGHTS:
        options["use_safetensors"] = True
    _check_files(folder, needed)
    try:
        return load(folder, local_files_only=True, **options)
    except (OSError, ValueError, RuntimeError, TypeError, LookupError) as error:
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ModelUnusable(f"The model part {folder} cannot be loaded: {reason}") from error


def _check_files(folder: Path, needed: str) -> None:
    """Name the file that is missing or broken: the libraries call that a failed download."""
    for pattern in (_CONFIG, needed):
        if not any(folder.glob(pattern)):
            raise ModelUnusable(f"The model part {folder} lacks a file {pattern}.")
    for file in sorted(folder.iterdir()):
        try:
            if file.suffix == ".json":
                if not isinstance(json.loads(file.read_text(encoding="utf-8")), dict):
                    raise ValueError("it holds no JSON object")
            elif file.suffix == ".safetensors":
                with safe_open(file, framework="pt"):  # reads the header, checks the size
                    pass
        except (OSError, ValueError, SafetensorError) as error:
            raise ModelUnusable(f"The model file {file} cannot be read: {error}") from error
