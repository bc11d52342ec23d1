"""Measure one forward pass of the whole transformer: `python -m benchmarks.speed.forward`.

The weights are random with the real shapes (`benchmarks/fixtures/random_wan.py`), batch 1, 81
frames. The baseline is diffusers' own `WanTransformer3DModel` in BF16, eager, as `WanPipeline` runs
it. Besides the times, the result has the memory of the weights, how close each mode is to its
bit-true emulation, and where the time of a pass goes. For step caches, it has what they cost when
they skip nothing, and what remains of a pass when they skip it; how often they skip can only be
measured with a trained model (`benchmarks/speed/step_cache.py`).

`--modes int8` measures INT8 instead, or beside the others: `--modes w8a8,int8`. FP8 attention, one
of the modes by default, needs a Hopper GPU. It prints a table, then the result as one line of JSON,
and saves it in benchmarks/results/.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated

import torch
import typer
from diffusers import WanTransformer3DModel
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import quant
from benchmarks import report
from benchmarks.fixtures.fused_transformer import fused_transformer
from benchmarks.fixtures.random_wan import (
    Inputs,
    calibrate_scales,
    random_inputs,
    random_transformer,
)
from benchmarks.report import Row
from benchmarks.timing import device_name, medians_ms, synchronize
from quant.kernels.eager import EagerKernels
from quant.kernels.interface import Kernels
from quant.kernels.selection import pick_kernels
from worker.config import FirstBlockCache, MagCache, StepCache
from worker.engine.step_cache import step_cache
from worker.model_loader.memory_plan import CACHED_PER_TOKEN

MODES = {
    "w8a8": ("w8a8", "boundary-hif8"),
    "w8a8-fp8attn": ("w8a8, FP8 attention", "boundary-hif8-fp8attn"),
    "int8": ("int8", "boundary-int8"),
}
"""By its name on the command line, a mode's name in the result, and its recipe."""

DEFAULT_MODES = "w8a8,w8a8-fp8attn"
GIB = 2**30

# Thresholds with which no pass is skipped, and with which every pass is after the first.
NEVER, ALWAYS = 1e-9, 1e9
CACHES: dict[str, StepCache] = {
    "first-block cache, nothing left out": FirstBlockCache(method="first_block", threshold=NEVER),
    "first-block cache, a pass left out": FirstBlockCache(method="first_block", threshold=ALWAYS),
    "MagCache, a pass left out": MagCache(
        method="mag",
        threshold=ALWAYS,
        mag_ratios=(1.0, 1.0),
        max_skipped_steps=1000,
        kept_share=0,
    ),
}

# Substrings of kernel names, in order: the first that matches decides the kind.
_KINDS = {
    "attention": ("sdpa", "flash", "attention"),
    "products": ("nvjet", "gemm", "cutlass", "cublas"),
    "between the products": ("_add_norm", "_norm_rope", "_elementwise", "_add_gated"),
}


def main(
    device: str = "cuda",
    sizes: str = "832x480,1280x720",
    modes: Annotated[str, typer.Option(help=f"Of {', '.join(MODES)}.")] = DEFAULT_MODES,
    frames: int = 81,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    tiny: Annotated[bool, typer.Option(help="A model of one head, for a rehearsal.")] = False,
) -> None:
    """Measure both resolutions in every mode."""
    if unknown := set(modes.split(",")) - MODES.keys():
        raise typer.BadParameter(f"{min(unknown)!r} is not one of {', '.join(MODES)}")
    chosen = dict(MODES[mode] for mode in modes.split(","))
    bench = _Bench(torch.device(device), frames, rounds, sizes.split(","), tiny, chosen)
    rows = bench.run()
    settings = {
        "sizes": bench.sizes,
        "frames": frames,
        "rounds": rounds,
        "tiny": tiny,
        "kernels": bench.kernels.name,
        "profile_ms": bench.profiles,
    }
    name = "forward" if modes == DEFAULT_MODES else f"forward-{modes.replace(',', '-')}"
    document = report.result(name, device_name(bench.device), settings, rows)
    report.print_table(rows)
    report.save(document)
    print(json.dumps(document))


@dataclass
class _Bench:
    device: torch.device
    frames: int
    rounds: int
    sizes: list[str]
    tiny: bool
    modes: dict[str, str]

    def __post_init__(self) -> None:
        self.recipes = {mode: quant.QuantRecipe.load(name) for mode, name in self.modes.items()}
        formats = {recipe.format for recipe in self.recipes.values()}
        choice = pick_kernels(
            self.device,
            quantized="hif8" in formats,
            fp8_attention=any(recipe.attention == "fp8" for recipe in self.recipes.values()),
            int8="int8" in formats,
        )
        if choice.warning is not None:
            raise SystemExit(choice.warning)
        self.kernels: Kernels = choice.kernels
        self.inputs = {s: random_inputs(self.device, s, self.frames) for s in self.sizes}
        self.baseline: dict[str, float] = {}
        self.profiles: dict[str, dict[str, float]] = {}

    def run(self) -> list[Row]:
        model = random_transformer(self.device, tiny=self.tiny)
        rows = report.log_rows(self._diffusers(model))
        small = random_inputs(self.device, self.sizes[0], 5)
        scales = {
            mode: calibrate_scales(model, recipe, small) for mode, recipe in self.recipes.items()
        }
        plain = fused_transformer(model, self.kernels)
        rows += report.log_rows(self._measure("bf16", plain))
        emulations: dict[str, Tensor] = {}  # with FP8 attention as without
        for mode, recipe in self.recipes.items():
            if recipe.format not in emulations:
                emulations[recipe.format], emulation = self._emulate(
                    mode, model, recipe, scales[mode]
                )
                rows += report.log_rows(emulation)
            emulated = emulations[recipe.format]
            ours = fused_transformer(model, self.kernels, recipe, scales[mode])
            rows += report.log_rows(self._measure(mode, ours))
            sqnr = min(report.EQUAL_DB, round(quant.sqnr_db(emulated, self._predict(ours)), 1))
            rows.append(Row(f"{self.sizes[0]}: {mode}, beside the emulation", sqnr, "dB"))
            rows += self._memory(mode, plain, ours)
            rows += report.log_rows(self._step_caches(mode, ours))
            del ours
            _free(self.device)
        return rows

    def _diffusers(self, model: WanTransformer3DModel) -> list[Row]:
        rows = []
        for size, inputs in self.inputs.items():
            ms = self._ms(model, inputs)
            self.baseline[size] = ms
            rows.append(Row(f"{size}: diffusers, eager BF16", ms, "ms"))
        weights = quant.weight_bytes(model)
        return [*rows, Row("weights, diffusers BF16", round(weights / GIB, 2), "GiB")]

    def _measure(self, mode: str, transformer: WanTransformer3DModel) -> list[Row]:
        rows = []
        for size, inputs in self.inputs.items():
            ms = self._ms(transformer, inputs)
            speed = round(self.baseline[size] / ms, 3)
            rows.append(Row(f"{size}: {mode}", ms, "ms", baseline=self.baseline[size]))
            rows.append(Row(f"{size}: {mode}, times as fast as diffusers", speed, "x"))
            self.profiles[f"{size}: {mode}"] = self._profile(transformer, inputs)
        return [*rows, self._guided(mode, transformer)]

    def _guided(self, mode: str, transformer: WanTransformer3DModel) -> Row:
        """Compare guidance's two passes in one batch with one after the other."""
        size = self.sizes[0]
        inputs = self.inputs[size]
        once, together = (
            self._ms(transformer, inputs),
            self._ms(transformer, inputs.guidance_batch()),
        )
        what = f"{size}: {mode}, both branches of guidance in one batch (baseline: one by one)"
        return Row(what, together, "ms", baseline=2 * once)

    def _emulate(
        self,
        mode: str,
        model: WanTransformer3DModel,
        recipe: quant.QuantRecipe,
        scales: quant.Scales,
    ) -> tuple[Tensor, list[Row]]:
        """Return the prediction of the bit-true emulation for the first size, and its rows.

        Attention is in BF16, because the emulation of FP8 attention in plain torch would need the
        whole attention matrix in memory.
        """
        emulated, _ = quant.quantize_transformer(model, recipe, scales)
        quant.fuse_quantized(emulated, EagerKernels(), {})
        size = self.sizes[0]
        predicted, ms = self._predict(emulated), self._ms(emulated, self.inputs[size])
        sqnr = round(quant.sqnr_db(self._predict(model), predicted), 1)
        del emulated
        _free(self.device)
        return predicted, [
            Row(f"{size}: {mode}, bit-true emulation", ms, "ms", baseline=self.baseline[size]),
            Row(f"{size}: {mode}, bit-true emulation beside BF16", sqnr, "dB"),
        ]

    def _predict(self, transformer: WanTransformer3DModel) -> Tensor:
        return self.inputs[self.sizes[0]].run(transformer).float()

    def _memory(
        self, mode: str, plain: WanTransformer3DModel, ours: WanTransformer3DModel
    ) -> list[Row]:
        alone, both = quant.weight_bytes(ours), quant.weight_bytes(plain, ours)
        return [
            Row(f"weights, {mode}", round(alone / GIB, 2), "GiB"),
            Row(f"weights, bf16 and {mode} together", round(both / GIB, 2), "GiB"),
        ]

    def _step_caches(self, mode: str, transformer: WanTransformer3DModel) -> list[Row]:
        """Measure a pass with each cache and without, and on a GPU the cache's memory."""
        size = self.sizes[0]
        inputs = self.inputs[size]
        inputs = replace(inputs, latents=inputs.latents.clone())

        def run() -> None:  # with new latents: a repeated pass is skipped at any threshold
            inputs.latents.normal_()
            inputs.run(transformer)

        def measure() -> tuple[float, int]:
            ms = medians_ms({"": run}, self.device, self.rounds, warm_up=1)[""]
            return round(ms, 1), self._peak_bytes(run)

        without_ms, least = measure()
        # With guidance there are two passes, each with its own residuals; here there is one.
        width = transformer.config.num_attention_heads * transformer.config.attention_head_dim
        counted = inputs.tokens * width * CACHED_PER_TOKEN // 2 * torch.bfloat16.itemsize
        steps = self.rounds + 10  # more than are run, because a cache is reset after the last
        rows = []
        for name, cache in CACHES.items():
            what = f"{size}: {mode}, {name}"
            with step_cache(transformer, cache, steps), transformer.cache_context("measured"):
                ms, most = measure()
            rows.append(Row(what, ms, "ms", baseline=without_ms))
            if self.device.type == "cuda" and cache.threshold == NEVER:
                gib, counted_gib = (round(each / GIB, 3) for each in (most - least, counted))
                what += ", memory for it (baseline: counted at a start)"
                rows.append(Row(what, gib, "GiB", baseline=counted_gib))
        return rows

    def _peak_bytes(self, run: Callable[[], None]) -> int:
        """Return the peak of a GPU's allocated memory during a run; 0 on a CPU."""
        if self.device.type != "cuda":
            return 0
        torch.cuda.reset_peak_memory_stats()
        run()
        synchronize(self.device)
        return torch.cuda.max_memory_allocated()

    def _ms(self, transformer: WanTransformer3DModel, inputs: Inputs) -> float:
        run = partial(inputs.run, transformer)
        return round(medians_ms({"": run}, self.device, self.rounds, warm_up=1)[""], 1)

    def _profile(self, transformer: WanTransformer3DModel, inputs: Inputs) -> dict[str, float]:
        """Return the device's milliseconds by kind of kernel; empty on a CPU."""
        if self.device.type != "cuda":
            return {}
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            inputs.run(transformer)
            synchronize(self.device)
        spent = dict.fromkeys([*_KINDS, "else"], 0.0)
        for event in profiler.key_averages():
            spent[_kind(event.key)] += event.self_device_time_total / 1000
        return {kind: round(ms, 1) for kind, ms in spent.items()}


def _kind(kernel: str) -> str:
    for kind, marks in _KINDS.items():
        if any(mark in kernel for mark in marks):
            return kind
    return "else"


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


if __name__ == "__main__":
    typer.run(main)
