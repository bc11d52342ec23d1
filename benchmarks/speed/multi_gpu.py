"""One job's denoising on several cards beside one of them, in one run:

    NCCL_NVLS_ENABLE=0 torchrun --standalone --nproc-per-node 2 -m benchmarks.speed.multi_gpu

The transformer of Wan2.1-T2V-14B with random weights, made on every card. A step is what a job's
step is: with guidance both forward passes, the exchange, the scheduler. First card 0 alone takes
the steps while the others wait, then all together; the first step of either counts as warm-up. The
latents of both are compared. Beside that, what the cards' own business costs: a vote, and the trade
of tokens for heads in one block. Rehearsal on a CPU: `--device cpu --tiny --size 64x64 --frames 5`.
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
from benchmarks.fixtures.random_wan import random_inputs, random_transformer, scales_from
from benchmarks.report import Row
from benchmarks.timing import device_name, medians_ms
from jobs.spec import GenerationRequest
from quant.transformer.context_parallel import split_tokens
from worker.device import pick_device
from worker.distributed.cfg_parallel import denoise_over_ranks
from worker.distributed.layout import RankLayout
from worker.distributed.rank_group import RankGroup, meet
from worker.engine.denoiser import Denoise, Embeddings, denoise_on
from worker.settings import DeviceChoice

RECIPES = {"bf16": None, "w8a8": "boundary-hif8", "w8a8-fp8attn": "boundary-hif8-fp8attn"}
GUIDANCE = {"guided": 5.0, "unguided": 1.0}
CALIBRATION_FRAMES = 9
ROUNDS = 10


@dataclass(frozen=True, slots=True)
class Job:
    """What is denoised: a video's size, so many frames, in so many steps."""

    size: str
    frames: int
    steps: int

    def request(self, mode: str, guidance_scale: float) -> GenerationRequest:
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
    mode: Annotated[list[str] | None, typer.Option(help="Of " + ", ".join(RECIPES))] = None,
    device: str = "cuda",
    tiny: bool = False,
) -> None:
    """Measure each mode, with guidance and without."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        raise typer.BadParameter("start it with torchrun --nproc-per-node 2 (or more)")
    choice: DeviceChoice = "cpu" if device == "cpu" else "cuda"
    on = pick_device(choice, 1 if choice == "cpu" else None, int(os.environ["LOCAL_RANK"]))
    with meet(on) as cards:
        cards.warm_up()
        rows = measure(cards, Job(size, frames, steps), mode or list(RECIPES), tiny)
        if not cards.leads:
            cards.hear()  # until the leader has written everything
            return
        name = f"{cards.world} x {device_name(on.torch_device)}"
        settings = {
            "cards": cards.world,
            "size": size,
            "frames": frames,
            "steps": steps,
            "tiny": tiny,
            "NCCL_NVLS_ENABLE": os.environ.get("NCCL_NVLS_ENABLE", "not set"),
        }
        document = report.result("cards", name, settings, rows)
        report.print_table(rows)
        report.keep(document)
        print(json.dumps(document))


def measure(cards: RankGroup, job: Job, modes: list[str], tiny: bool) -> list[Row]:
    on = cards.device.torch_device
    base = random_transformer(on, tiny=tiny, tiny_heads=4)
    inputs = random_inputs(on, job.size, job.frames)
    prompts = [random_inputs(on, job.size, 1, seed=seed).prompt for seed in (1, 2)]
    rows = business(cards, inputs.tokens, base.config.num_attention_heads)
    for mode in modes:
        transformer = prepared(cards, base, mode, job.size)
        split_tokens(transformer, cards.ulysses)
        for guidance, scale in GUIDANCE.items():
            cards.vote()
            request = job.request(mode, scale)
            embeddings = (prompts[0], prompts[1] if scale > 1 else None)
            rows += compare(cards, f"{mode}, {guidance}", transformer, request, embeddings)
        if cards.leads:
            print(f"{mode}: done", flush=True)
        del transformer
        cards.device.empty_cache()
    return rows


def prepared(cards: RankGroup, base: Any, mode: str, size: str) -> Any:
    """A twin of `base` in a mode, on the device's kernels."""
    name, device = RECIPES[mode], cards.device
    choice = device.pick_kernels(quantized=name is not None)
    assert choice is not None, "these devices have kernels of ours"
    if cards.leads:
        print(f"{mode}: {choice.kernels.name} kernels {choice.warning or ''}", flush=True)
    if name is None:
        return quant.prepare_transformer(base, choice.kernels).transformer
    recipe = quant.QuantRecipe.load(name)
    if cards.leads:  # of noise that no other card draws
        inputs = random_inputs(device.torch_device, size, CALIBRATION_FRAMES)
        scales = scales_from(base, recipe, inputs)
        cards.tell(scales)
    else:
        scales = cards.hear()
    return quant.prepare_transformer(base, choice.kernels, recipe, scales).transformer


def compare(
    cards: RankGroup,
    what: str,
    transformer: Any,
    request: GenerationRequest,
    embeddings: Embeddings,
) -> list[Row]:
    """Rows on the leader; the others only take part."""

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
        at: list[float] = []
        latents = denoise(pipeline, request, embeddings, lambda _: at.append(time.perf_counter()))
        return latents, 1000 * statistics.median(b - a for a, b in pairwise(at))

    alone = run(denoise_on(cards.device)) if cards.leads else None
    cards.vote()
    latents, ms = run(denoise_over_ranks(cards))
    if alone is None:
        return []
    same = torch.equal(alone[0], latents)
    agreement = report.SAME_DB if same else quant.sqnr_db(alone[0], latents)
    together = f"{cards.world} cards"
    return [
        Row(f"{what}: a step on {together} (baseline: 1 card)", ms, "ms", baseline=alone[1]),
        Row(f"{what}: speed of {together} over 1", round(alone[1] / ms, 4), "x"),
        Row(f"{what}: latents of {together} to those of 1", round(agreement, 1), "dB SQNR"),
    ]


def business(cards: RankGroup, tokens: int, heads: int) -> list[Row]:
    """What votes and trades cost, by themselves."""
    on = cards.device.torch_device
    rows = [Row("a vote", timed(cards, cards.vote), "ms")]
    for guidance, scale in GUIDANCE.items():
        layout = RankLayout.of(cards.world, scale > 1)
        if layout.ulysses == 1:
            continue
        for dtype in (torch.bfloat16, torch.float8_e4m3fn):
            shape = (1, tokens // layout.ulysses, heads, 128)
            q, k, v = (torch.randn(shape, device=on).to(dtype) for _ in range(3))
            attention = cards.ulysses.attention(lambda q, *_: q.flatten(2))
            trade = partial(attention, q, k, v, None, shape[1])
            with cards.laid_out(layout):
                ms = timed(cards, trade)
            name = f"{guidance}: trade of one block, {tokens} tokens over {layout.ulysses} cards"
            rows.append(Row(f"{name}, {str(dtype).removeprefix('torch.')}", ms, "ms"))
    return rows


def timed(cards: RankGroup, run: Callable[[], object]) -> float:
    """The median of some runs, begun together."""
    cards.vote()
    return medians_ms({"": run}, cards.device.torch_device, ROUNDS)[""]


if __name__ == "__main__":
    typer.run(main)
