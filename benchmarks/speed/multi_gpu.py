"""Measure the denoising of one job on several GPUs against one of them, in one run.

    NCCL_NVLS_ENABLE=0 torchrun --standalone --nproc-per-node 2 -m benchmarks.speed.multi_gpu

The transformer of Wan2.1-T2V-14B with random weights is created on every rank. A step includes all
that a job's step does: with guidance both forward passes, the exchange between ranks, and the
scheduler. First rank 0 runs the steps alone while the others wait, then all ranks run them; the
first step of each counts as warm-up. The latents of both runs are compared. The communication is
also measured by itself: a synchronization with votes, and one block's exchange of tokens for heads.

To try it on a CPU: `--device cpu --tiny --size 64x64 --frames 5`.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Annotated, Any

import torch
import typer
from diffusers import UniPCMultistepScheduler, WanPipeline
from torch import Tensor

import quant
from benchmarks import report
from benchmarks.fixtures.fused_transformer import fused_transformer
from benchmarks.fixtures.random_wan import calibrate_scales, random_inputs, random_transformer
from benchmarks.report import Row
from benchmarks.timing import device_name, medians_ms
from jobs.spec import GenerationRequest
from quant.transformer.context_parallel import split_tokens
from worker.device import pick_device
from worker.distributed.cfg_parallel import denoise_over_ranks
from worker.distributed.layout import RankLayout
from worker.distributed.rank_group import RankGroup, join
from worker.engine.denoiser import Denoise, Embeddings, denoise_on
from worker.settings import DeviceChoice

RECIPES = {"bf16": None, "w8a8": "boundary-hif8", "w8a8-fp8attn": "boundary-hif8-fp8attn"}
GUIDANCE = {"guided": 5.0, "unguided": 1.0}
CALIBRATION_FRAMES = 9
ROUNDS = 10


@dataclass(frozen=True, slots=True)
class Job:
    """The job that is denoised."""

    size: str
    frames: int
    steps: int

    def request(self, mode: str, guidance_scale: float) -> GenerationRequest:
        """Return its request in a mode."""
        return GenerationRequest(
            prompt="noise",
            negative_prompt="other noise",
            mode=mode,
            size=self.size,
            num_frames=self.frames,
            num_inference_steps=self.steps,
            guidance_scale=guidance_scale,
            seed=0,
            model="random",
        )


def main(
    size: str = "832x480",
    frames: int = 81,
    steps: Annotated[int, typer.Option(min=2, help="The first is not counted.")] = 4,
    mode: Annotated[list[str] | None, typer.Option(help="Any of " + ", ".join(RECIPES))] = None,
    device: str = "cuda",
    tiny: bool = False,
) -> None:
    """Measure each mode, with guidance and without, and write the result."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        raise typer.BadParameter("start it with torchrun --nproc-per-node 2 (or more)")
    choice: DeviceChoice = "cpu" if device == "cpu" else "cuda"
    on = pick_device(choice, 1 if choice == "cpu" else None, int(os.environ["LOCAL_RANK"]))
    with join(on) as ranks:
        ranks.warm_up()
        rows = measure(ranks, Job(size, frames, steps), mode or list(RECIPES), tiny)
        if not ranks.is_leader:
            ranks.receive()  # until the leader has written everything
            return
        name = f"{ranks.world} x {device_name(on.torch_device)}"
        settings = {
            "cards": ranks.world,
            "size": size,
            "frames": frames,
            "steps": steps,
            "tiny": tiny,
            "NCCL_NVLS_ENABLE": os.environ.get("NCCL_NVLS_ENABLE", "not set"),
        }
        document = report.result("cards", name, settings, rows)
        report.print_table(rows)
        report.save(document)
        print(json.dumps(document))


def measure(ranks: RankGroup, job: Job, modes: list[str], tiny: bool) -> list[Row]:
    """Run all measurements on all ranks; return the rows."""
    on = ranks.device.torch_device
    base = random_transformer(on, tiny=tiny, tiny_heads=4)
    inputs = random_inputs(on, job.size, job.frames)
    prompts = [random_inputs(on, job.size, 1, seed=seed).prompt for seed in (1, 2)]
    rows = communication_rows(ranks, inputs.tokens, base.config.num_attention_heads)
    for mode in modes:
        transformer = prepare(ranks, base, mode, job.size)
        split_tokens(transformer, ranks.ulysses)
        for guidance, scale in GUIDANCE.items():
            ranks.sync_or_abort()
            request = job.request(mode, scale)
            embeddings = (prompts[0], prompts[1] if scale > 1 else None)
            rows += compare(ranks, f"{mode}, {guidance}", transformer, request, embeddings)
        if ranks.is_leader:
            print(f"{mode}: done", flush=True)
        del transformer
        ranks.device.empty_cache()
    return rows


def prepare(ranks: RankGroup, base: Any, mode: str, size: str) -> Any:
    """Return a shared copy of `base` in a mode, on the device's kernels."""
    name, device = RECIPES[mode], ranks.device
    choice = device.pick_kernels(
        quantized=name is not None, fp8_attention=name == RECIPES["w8a8-fp8attn"]
    )
    if ranks.is_leader:
        print(f"{mode}: {choice.kernels.name} kernels {choice.warning or ''}", flush=True)
    if name is None:
        return fused_transformer(base, choice.kernels)
    recipe = quant.QuantRecipe.load(name)
    if ranks.is_leader:  # calibrated on noise that other ranks do not draw
        inputs = random_inputs(device.torch_device, size, CALIBRATION_FRAMES)
        scales = calibrate_scales(base, recipe, inputs)
        ranks.broadcast(scales)
    else:
        scales = ranks.receive()
    return fused_transformer(base, choice.kernels, recipe, scales)


def compare(
    ranks: RankGroup,
    what: str,
    transformer: Any,
    request: GenerationRequest,
    embeddings: Embeddings,
) -> list[Row]:
    """Compare rank 0 alone with all ranks; return rows on the leader, an empty list on others."""

    def run(denoise: Denoise) -> tuple[Tensor, float]:
        pipeline = WanPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=None,
            scheduler=UniPCMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
            ),
            transformer=transformer,
        )
        pipeline.set_progress_bar_config(disable=True)
        ends: list[float] = []
        clock = lambda _step, _latents: ends.append(time.perf_counter())  # noqa: E731
        latents = denoise(pipeline, request, embeddings, clock)
        return latents, 1000 * statistics.median(b - a for a, b in pairwise(ends))

    alone = run(denoise_on(ranks.device)) if ranks.is_leader else None
    ranks.sync_or_abort()
    latents, ms = run(denoise_over_ranks(ranks))
    if alone is None:
        return []
    same = torch.equal(alone[0], latents)
    agreement = report.EQUAL_DB if same else quant.sqnr_db(alone[0], latents)
    together = f"{ranks.world} cards"
    return [
        Row(f"{what}: a step on {together} (baseline: 1 card)", ms, "ms", baseline=alone[1]),
        Row(f"{what}: speed of {together} over 1", round(alone[1] / ms, 4), "x"),
        Row(f"{what}: latents of {together} to those of 1", round(agreement, 1), "dB SQNR"),
    ]


def communication_rows(ranks: RankGroup, tokens: int, heads: int) -> list[Row]:
    """Measure a synchronization and the exchange of one block by themselves."""
    on = ranks.device.torch_device
    rows = [Row("a vote", timed(ranks, ranks.sync_or_abort), "ms")]
    for guidance, scale in GUIDANCE.items():
        layout = RankLayout.of(ranks.world, scale > 1)
        if layout.ulysses == 1:
            continue
        for dtype in (torch.bfloat16, torch.float8_e4m3fn):
            shape = (1, tokens // layout.ulysses, heads, 128)
            q, k, v = (torch.randn(shape, device=on).to(dtype) for _ in range(3))
            attention = ranks.ulysses.attention(lambda q, *_: q.flatten(2))
            exchange = partial(attention, q, k, v, None, None)
            with ranks.use_layout(layout):
                ms = timed(ranks, exchange)
            name = f"{guidance}: trade of one block, {tokens} tokens over {layout.ulysses} cards"
            rows.append(Row(f"{name}, {str(dtype).removeprefix('torch.')}", ms, "ms"))
    return rows


def timed(ranks: RankGroup, run: Callable[[], object]) -> float:
    """Return the median milliseconds of runs that start on all ranks together."""
    ranks.sync_or_abort()
    return medians_ms({"": run}, ranks.device.torch_device, ROUNDS)[""]


if __name__ == "__main__":
    typer.run(main)
