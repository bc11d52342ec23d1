"""Write one LoRA in the formats of several tools, and compute what it adds in another way."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from quant import LoraSet
from tests.quant.weights.model_folders import copy_model, original_name, rename_weights

RANK, ALPHA = 4, 2.0
MODULES = (
    "blocks.0.attn1.to_q",
    "blocks.1.attn2.to_k",
    "blocks.1.attn2.to_out.0",
    "blocks.2.ffn.net.0.proj",
    "blocks.3.ffn.net.2",
    "condition_embedder.time_embedder.linear_1",
    "condition_embedder.text_embedder.linear_2",
    "condition_embedder.time_proj",
    "proj_out",
    "patch_embedding",
)
Factors = dict[str, tuple[Tensor, Tensor]]
"""Down [rank, in] and up [out, rank] by the name of a module in diffusers."""
Tensors = dict[str, Tensor]


def random_factors(state: Mapping[str, Tensor], seed: int = 5, rank: int = RANK) -> Factors:
    """Make factors for `MODULES` of a transformer with this state dict."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) / 4

    found = {}
    for module in MODULES:
        out, *rest = state[f"{module}.weight"].shape
        found[module] = (draw(rank, *rest), draw(out, rank, *(1 for _ in rest[1:])))
    return found


def original_module(module: str) -> str:
    """Return what Wan's authors call a module of diffusers."""
    return original_name(f"{module}.weight").removesuffix(".weight")


def diffusers_tensors(factors: Factors, prefix: str = "transformer.", adapter: str = "") -> Tensors:
    """Name factors as diffusers or PEFT does."""
    return {
        f"{prefix}{module}.lora_{letter}{adapter}.weight": tensor
        for module, pair in factors.items()
        for letter, tensor in zip("AB", pair, strict=True)
    }


def _save(folder: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> Path:
    file = folder / "lora.safetensors"
    save_file({name: each.contiguous() for name, each in tensors.items()}, file, metadata)
    return file


def by_diffusers(folder: Path, factors: Factors) -> Path:
    """Write a file as diffusers' pipelines do."""
    config = {"transformer.r": RANK, "transformer.lora_alpha": ALPHA}
    metadata = {"lora_adapter_metadata": json.dumps(config)}
    return _save(folder, diffusers_tensors(factors), metadata)


def by_peft(folder: Path, factors: Factors) -> Path:
    """Write a folder as PEFT does, in which patterns of names have the alphas."""
    save_file(diffusers_tensors(factors, "base_model.model."), folder / "adapter_model.safetensors")
    named = (module for module in factors if module != "blocks.2.ffn.net.0.proj")
    patterns = dict.fromkeys(named, ALPHA) | {r"blocks\.2\..*proj": ALPHA}
    config = {"r": RANK, "lora_alpha": 99, "alpha_pattern": patterns}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def by_peft_with_rslora(folder: Path, factors: Factors) -> Path:
    """Write a folder as PEFT does with rsLoRA: alpha is over the root of the rank."""
    save_file(diffusers_tensors(factors, ""), folder / "adapter_model.safetensors")
    config = {"r": RANK, "lora_alpha": ALPHA / RANK**0.5, "use_rslora": True}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder / "adapter_model.safetensors"


def with_adapter_names(folder: Path, factors: Factors) -> Path:
    """Write a file with the adapter's name within each tensor's."""
    tensors = diffusers_tensors(factors, adapter=".default")
    return _save(folder, tensors, {"lora_adapter_metadata": json.dumps({"lora_alpha": ALPHA})})


def _with_alphas(factors: Factors, name: Callable[[str], str], parts: tuple[str, str]) -> Tensors:
    tensors: Tensors = {}
    for module, pair in factors.items():
        for part, tensor in zip(parts, pair, strict=True):
            tensors[f"{name(module)}.{part}.weight"] = tensor
        tensors[f"{name(module)}.alpha"] = torch.tensor(ALPHA)
    return tensors


def by_musubi(folder: Path, factors: Factors) -> Path:
    """Write a file as kohya's and musubi's tools do."""

    def name(module: str) -> str:
        return "lora_unet_" + original_module(module).replace(".", "_")

    return _save(folder, _with_alphas(factors, name, ("lora_down", "lora_up")), {"ss_seed": "1"})


def by_kohya_of_diffusers(folder: Path, factors: Factors) -> Path:
    """Write a file as kohya's tools do, of a transformer in diffusers."""

    def name(module: str) -> str:
        return "lora_transformer_" + module.replace(".", "_")

    return _save(folder, _with_alphas(factors, name, ("lora_down", "lora_up")), {})


def for_comfyui(folder: Path, factors: Factors) -> Path:
    """Write a file with the original names behind ComfyUI's prefix; one alpha is an integer."""

    def name(module: str) -> str:
        return f"diffusion_model.{original_module(module)}"

    tensors = _with_alphas(factors, name, ("lora_A", "lora_B"))
    tensors[f"{name(MODULES[0])}.alpha"] = torch.tensor([int(ALPHA)])
    return _save(folder, tensors, {})


def with_original_names(folder: Path, factors: Factors) -> Path:
    """Write a file with the original names alone, and lora_down and lora_up."""
    return _save(folder, _with_alphas(factors, original_module, ("lora_down", "lora_up")), {})


FORMATS = (
    by_diffusers,
    by_peft,
    by_peft_with_rslora,
    with_adapter_names,
    by_musubi,
    by_kohya_of_diffusers,
    for_comfyui,
    with_original_names,
)


def product(factors: tuple[Tensor, Tensor]) -> Tensor:
    """Multiply factors in float64: [out, in …]."""
    down, up = (each.double() for each in factors)
    return torch.einsum("or,ri->oi", up.flatten(1), down.flatten(1)).view(len(up), *down.shape[1:])


def save_merged(model: Path, to: Path, loras: LoraSet) -> Path:
    """Copy a model's folder, with LoRAs merged into its files."""
    copy = copy_model(model, to)

    def merge(tensors: Tensors) -> Tensors:
        # diffusers computes the time's embedding in float32, so that a merged one is not rounded.
        wide = {name: each.float() for name, each in tensors.items() if "time_embedder" in name}
        return {name: loras.merged(name, each) for name, each in (tensors | wide).items()}

    rename_weights(copy / "transformer", merge)
    return copy


def assert_rounded_once(found: Tensor, exact: Tensor) -> None:
    """Hold a tensor to an exact sum in float64, rounded to the tensor's type.

    float32 sums may be off by a few of their last bits, so what lies that close to the middle of
    two numbers may be rounded to either.
    """
    slack = exact.abs().amax() * 2**-22
    low, high = ((exact + sign * slack).float().to(found.dtype) for sign in (-1, 1))
    assert ((low <= found) & (found <= high)).all()
    assert (found == exact.float().to(found.dtype)).float().mean() > 0.99
