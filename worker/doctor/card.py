"""Check the device: that it computes, which kernels run on it and how fast, and whole tiny jobs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from quant.device import backend
from quant.kernels.interface import Kernels, Norm
from quant.kernels.selection import KernelChoice
from quant.kernels.self_test import BlockShape
from quant.numerics.linear import Hif8Linear
from quant.numerics.scaling import scale_policy
from worker.config import WorkerConfig
from worker.device import Device, pick_device
from worker.doctor.report import Fault, Finding
from worker.engine.wan_engine import WanEngine
from worker.job.proof import prove_mode
from worker.model_loader.mode_plan import ModePlan, distinct_plans, kernels_of
from worker.settings import WorkerSettings
from worker.startup import load_engine

_TOKENS = 4096
"""Tokens of the timings on an accelerator; a CPU has a 64th of them."""

_REPEATS = 5


def device(settings: WorkerSettings) -> Callable[[], Finding]:
    """Build the check that the device is there, and multiplies and copies right."""

    def look() -> Finding:
        found = pick_device(settings.device, settings.threads, settings.local_rank)
        left = torch.ones(64, 64, device=found.torch_device, dtype=found.dtype)
        product = (left @ left).sum().item()
        found.synchronize()
        if product != 64.0**3:
            raise Fault(
                f"{found.name} multiplies ones to {product}, not to {64.0**3}",
                "use another card: this one, its driver or its libraries are broken",
            )
        count = 1 if found.kind == "cpu" else backend(found.kind).device_count()
        figures: dict[str, float | str] = {"kind": found.kind, "devices": count}
        memory = found.memory()
        if memory is not None:
            figures |= {
                "memory_gib": round(memory.total_bytes / 2**30, 1),
                "free_gib": round((found.available_bytes() or 0) / 2**30, 1),
            }
        return Finding(f"{found.name} multiplies", figures=figures, value=found)

    return look


def kernels(plans: list[ModePlan] | None, found: Device | None) -> Callable[[], Finding]:
    """Build the trial of each mode's kernels, with the time of their operations."""

    def look() -> Finding:
        assert plans is not None, "the report skips this check without scales"
        assert found is not None, "the report skips this check without a device"
        figures: dict[str, float | str] = {}
        names, warnings = [], []
        for plan in distinct_plans(plans):
            started = time.perf_counter()
            choice = kernels_of(plan, found)
            mode = plan.config.name
            figures[f"{mode}: trial_s"] = round(time.perf_counter() - started, 2)
            names.append(f"{mode} on {_name(choice)}")
            if choice is None:
                continue
            if choice.warning:
                warnings.append(f"{mode}: {choice.warning}")
            for what, seconds in time_kernels(
                choice.kernels, plan.shape, found, quantized=plan.recipe is not None
            ).items():
                figures[f"{mode}: {what}_ms"] = round(1e3 * seconds, 3)
        return Finding(", ".join(names), " ".join(warnings) or None, figures, value=True)

    return look


@torch.no_grad()
def time_kernels(
    kernels: Kernels, shape: BlockShape, found: Device, *, quantized: bool
) -> dict[str, float]:
    """Return the median seconds of a block's operations, in the shape of the model's blocks."""
    tokens = _TOKENS if found.kind != "cpu" else _TOKENS // 64
    where, act_scale = found.torch_device, 1.0 if quantized else None
    x, hidden = (
        torch.randn(1, tokens, width, device=where).to(found.dtype)
        for width in (shape.width, shape.ffn)
    )
    vector = torch.randn(1, shape.width, device=where)
    norm = Norm(vector, vector, 1e-6, plus_one=True)
    linear = nn.Linear(shape.width, shape.width).to(where, found.dtype)
    if quantized:
        one = torch.ones((), device=where)
        policy = scale_policy("pow2")
        multiply = kernels.quantized(
            [Hif8Linear.from_linear(linear, one / 16, act_scale=one, act_policy=policy)]
        )
    else:
        multiply = kernels.plain([linear])
    heads = x.view(1, tokens, shape.heads, shape.head_size)
    rounded = kernels.round_act(x, act_scale)
    calls: dict[str, Callable[[], object]] = {
        "sum and norm": lambda: kernels.add_norm(x, x, vector, norm, act_scale),
        "GELU": lambda: kernels.gelu(hidden, act_scale),
        "rounding": lambda: kernels.round_act(x, act_scale),
        "product": lambda: multiply(rounded),
        "attention": lambda: kernels.attention(heads, heads, heads, None, act_scale),
    }
    if not quantized:
        del calls["rounding"]
    return {f"{what} of {tokens} tokens": _median(call, found) for what, call in calls.items()}


def engine(config: WorkerConfig | None, found: Device | None) -> Callable[[], Finding]:
    """Build the check that loads the whole model in all its modes."""

    def look() -> Finding:
        assert config is not None, "the report skips this check without a configuration"
        assert found is not None, "the report skips this check without a device"
        loaded = load_engine(config, found)
        return Finding("; ".join(loaded.describe()[4:]), value=loaded)

    return look


def tiny_job(loaded: WanEngine | None, mode: str, scratch: Path | None) -> Callable[[], Finding]:
    """Build the check that a mode makes a tiny video; an MP4 of it, if there is a folder."""

    def look() -> Finding:
        assert loaded is not None, "the report skips this check without a model"
        seconds = prove_mode(loaded, mode, scratch)
        figures: dict[str, float | str] = {
            "text_encoder_s": round(seconds.text_encoder_s, 3),
            "denoise_s": round(seconds.denoise_s, 3),
            "vae_s": round(seconds.vae_s, 3),
        }
        memory = loaded.device.memory()
        if memory is not None:
            figures["peak_gib"] = round(memory.peak_bytes / 2**30, 2)
        ends = "an MP4" if scratch is not None else "latents"
        return Finding(f"one step becomes {ends}", figures=figures)

    return look


def _name(choice: KernelChoice | None) -> str:
    return "diffusers' blocks" if choice is None else f"{choice.kernels.name} kernels"


def _median(call: Callable[[], object], found: Device) -> float:
    seconds = []
    for _ in range(_REPEATS + 1):  # the first may compile
        started = time.perf_counter()
        call()
        found.synchronize()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])
