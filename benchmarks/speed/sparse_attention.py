"""Measure sparse attention at the 14B's sizes: `python -m benchmarks.speed.sparse_attention`.

`--part kernel` measures the kernel alone, for each density and tiling: milliseconds, and TFLOP/s of
what is computed. Beside it are dense attention, the choice of blocks and its lists, and how close
some blocks of queries come to attention in float32 over the same keys. Random blocks are kept.

`--part forward` measures passes of the whole transformer with random weights, as
`benchmarks.speed.forward` does: diffusers' eager BF16, ours in BF16 and in `w8a8`, and `w8a8` with
sparse attention at each density. Blocks are chosen as in a job, every few steps, and what that
costs is counted; then a random choice of the wanted density takes the place of the result, because
random weights have no attention to choose by. Nothing is said about quality.

`--part vae` measures diffusers' VAE, to compute a whole job of diffusers from its passes.

Each value is saved in benchmarks/results/ as soon as it is measured.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from dataclasses import astuple, dataclass, field, replace
from functools import partial
from itertools import product
from typing import Annotated, Literal
from unittest import mock

import torch
import typer
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import Tensor

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
from jobs.geometry import latent_frames, parse_size
from quant.kernels.selection import pick_kernels
from quant.kernels.self_test import BlockShape
from quant.kernels.sparse import blocks, triton_attention
from quant.kernels.sparse.triton_attention import LARGE, Tiling
from quant.recipe.sparse import SparseSettings
from quant.transformer.attention import sparse as sparse_attention

RECIPE = "boundary-hif8-sparse"
HEADS, WIDTH = 40, 128
TOKENS = (32_760, 75_600)
"""The sequence lengths of 81 frames at 832x480 and at 1280x720."""

TILINGS = (
    LARGE,
    Tiling(tile=64, stages=4, reuse=False),
    Tiling(tile=64, stages=3, reuse=False),
    Tiling(tile=128, stages=2, reuse=False),
)
"""Those that fit an H200 and that its assembler compiles without waiting for every product."""

Part = Literal["kernel", "forward", "vae"]


@dataclass
class _Bench:
    """Where and how to measure, and what was measured."""

    part: Part
    device: torch.device
    rounds: int
    densities: list[float]
    divide: int
    rows: list[Row] = field(default_factory=list)

    def keep(self, what: str, value: float, unit: str, baseline: float | None = None) -> None:
        """Print and save a value."""
        self.rows += report.log_rows([Row(what, value, unit, baseline=baseline)])
        sparse = _settings()
        settings = {
            "rounds": self.rounds,
            "divide": self.divide,
            "densities": self.densities,
            "recipe": RECIPE,
            "dense_steps": sparse.dense_steps,
            "every_steps": sparse.every_steps,
        }
        name = f"sparse-{self.part}"
        self.document = report.result(name, device_name(self.device), settings, self.rows)
        report.save(self.document)


def main(
    part: Part = "kernel",
    device: str = "cuda",
    sizes: str = "832x480,1280x720",
    densities: str = "0.3,0.15",
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    divide: Annotated[int, typer.Option(min=1, help="Divide all sizes, for a rehearsal.")] = 1,
) -> None:
    """Measure one part and write the result."""
    shares = [float(each) for each in densities.split(",")]
    bench = _Bench(part, torch.device(device), rounds, shares, divide)
    with torch.no_grad():
        if part == "kernel":
            for tokens in TOKENS:
                _measure_kernel(bench, tokens // divide, max(1, HEADS // divide))
        elif part == "forward":
            _measure_forward(bench, sizes.split(","))
        else:
            for size in sizes.split(","):
                _measure_vae(bench, size)
    report.print_table(bench.rows)
    print(json.dumps(bench.document))


def draw_kept(tokens: int, heads: int, block: int, density: float, device: torch.device) -> Tensor:
    """Keep random blocks of keys, [1, heads, M, M]: some at least for each block of queries."""
    count = -(-tokens // block)
    drawn = torch.rand(1, heads, count, count, device=device)
    return drawn.argsort(-1) < max(1, round(density * count))


def _measure_kernel(bench: _Bench, tokens: int, heads: int) -> None:
    device, block = bench.device, _settings().block
    # The interpreter multiplies no BF16.
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    q, k, v = (torch.randn(1, tokens, heads, WIDTH, device=device, dtype=dtype) for _ in range(3))
    measure = partial(medians_ms, device=device, rounds=bench.rounds, warm_up=1, queued=True)
    dense_ms = None
    if device.type == "cuda":
        dense = pick_kernels(device, quantized=False).kernels
        dense_ms = measure({"": lambda: dense.attention(q, k, v, None, None)})[""]
        bench.keep(f"{tokens} tokens: {dense.name}, dense", dense_ms, "ms")
    for density, tiling in product([1.0, 0.5, *bench.densities], TILINGS):
        kept = draw_kept(tokens, heads, block, density, device)
        computed = blocks.density(kept, tokens, block).item()
        run = partial(triton_attention.attend_blocks, q, k, v, kept, block, tiling)
        where = f"{tokens} tokens: density {density:g}, tiling {astuple(tiling)}"
        try:
            ms = measure({"": run})[""]
        except Exception as error:  # noqa: BLE001 (compilers and drivers raise many kinds)
            print(f"{where}: {error}")
            continue
        flop = 4 * tokens**2 * heads * WIDTH * computed
        bench.keep(where, ms, "ms", dense_ms)
        bench.keep(f"{where}, of what is computed", round(flop / ms / 1e9, 1), "TFLOP/s")
    for name, ms in measure(
        {
            "choice of blocks": lambda: blocks.choose_blocks(q, k, block, 0.3),
            "mass of the choice": lambda: blocks.sample_mass(q, k, kept, block),
            "lists of blocks": lambda: triton_attention.list_kept(kept),
        }
    ).items():
        bench.keep(f"{tokens} tokens: {name}", ms, "ms")
    kept = draw_kept(tokens, heads, block, 0.3, device)
    for name, each in (("randn", q), ("randn, peaked", 4 * q)):
        found = triton_attention.attend_blocks(each, k, v, kept, block)
        largest, sqnr = _beside_float32(found, each, k, v, kept, block)
        bench.keep(f"{tokens} tokens: {name}, largest error beside float32", largest, "")
        bench.keep(f"{tokens} tokens: {name}, beside float32", sqnr, "dB")


def _beside_float32(
    found: Tensor, q: Tensor, k: Tensor, v: Tensor, kept: Tensor, block: int
) -> tuple[float, float]:
    """Return the largest error, and the SQNR, of four blocks of queries, with the last one."""
    tokens, count = q.shape[1], kept.shape[-1]
    ours, exact = [], []
    for number in sorted({0, count // 3, 2 * count // 3, count - 1}):
        rows = slice(number * block, min(tokens, (number + 1) * block))
        seen = kept[:, :, number].repeat_interleave(block, -1)[..., :tokens]
        for head in range(q.shape[2]):
            keys, values = (x[0, seen[0, head], head].float() for x in (k, v))
            scores = q[0, rows, head].float() @ keys.t() * WIDTH**-0.5
            exact.append(scores.softmax(-1) @ values)
            ours.append(found[0, rows, head].float())
    expected, attended = torch.cat(exact), torch.cat(ours)
    largest = (attended - expected).abs().max().item()
    return round(largest, 6), round(quant.sqnr_db(expected, attended), 1)


def _settings() -> SparseSettings:
    recipe = quant.QuantRecipe.load(RECIPE)
    assert recipe.sparse is not None
    return replace(recipe.sparse, dense_steps=0)


def _measure_forward(bench: _Bench, sizes: list[str]) -> None:
    tiny, device = bench.divide > 1, bench.device
    model = random_transformer(device, tiny=tiny)
    inputs = {size: random_inputs(device, size, 5 if tiny else 81) for size in sizes}
    eager = {size: _pass_ms(bench, model, inputs[size]) for size in sizes}
    for size, ms in eager.items():
        bench.keep(f"{size}: diffusers, eager BF16", ms, "ms")

    def keep(what: str, size: str, ms: float) -> None:
        bench.keep(f"{size}: {what}", round(ms, 1), "ms", eager[size])
        speed = round(eager[size] / ms, 3)
        bench.keep(f"{size}: {what}, times as fast as diffusers", speed, "x")

    settings = _settings()
    recipe = replace(quant.QuantRecipe.load(RECIPE), sparse=settings)
    shape = BlockShape.of(model.config)
    choice = pick_kernels(device, quantized=True, shape=shape, sparse_block=settings.block)
    print(f"{choice.kernels.name} kernels, {choice.warning or 'no warning'}")
    scales = calibrate_scales(model, recipe, random_inputs(device, sizes[0], 5))
    dense = quant.QuantRecipe.load("boundary-hif8")
    for name, of in (("bf16", None), ("w8a8", dense)):
        ours = fused_transformer(model, choice.kernels, of, scales)
        for size in sizes:
            keep(f"{name}, dense", size, _pass_ms(bench, ours, inputs[size]))
        del ours
        _free(device)
    sparse = fused_transformer(model, choice.kernels, recipe, scales)
    for size, density in product(sizes, bench.densities):
        for what, ms in _sparse_ms(bench, sparse, settings, inputs[size], density):
            keep(f"w8a8, {density:.0%} of blocks, {what}", size, ms)


def _sparse_ms(
    bench: _Bench,
    sparse: WanTransformer3DModel,
    settings: SparseSettings,
    inputs: Inputs,
    density: float,
) -> Iterator[tuple[str, float]]:
    """Measure a pass that chooses blocks, one that does not, and the mean over a job's steps."""
    heads, every = sparse.config.num_attention_heads, settings.every_steps
    kept = draw_kept(inputs.tokens, heads, settings.block, density, bench.device)

    def choose(q: Tensor, k: Tensor, block: int, share_of_mass: float) -> Tensor:
        blocks.choose_blocks(q, k, block, share_of_mass)
        return kept

    attention = quant.sparse_attention_of(sparse)
    assert attention is not None
    with mock.patch.object(sparse_attention, "choose_blocks", choose):
        choosing = _pass_ms(bench, sparse, inputs)  # outside of a run each pass chooses
        with quant.denoising_run(sparse):
            inputs.run(sparse)
            # Few enough passes that none chooses again.
            rounds = min(bench.rounds, every - 2)
            reusing = _pass_ms(replace(bench, rounds=rounds), sparse, inputs)
            shares = attention.shares()
    assert shares is not None
    bench.keep(f"{inputs.tokens} tokens: density of what is kept", round(shares.density, 4), "")
    yield "with the choice", choosing
    yield "without the choice", reusing
    yield f"choice every {every} steps", (choosing + (every - 1) * reusing) / every


def _pass_ms(bench: _Bench, transformer: WanTransformer3DModel, inputs: Inputs) -> float:
    run = partial(inputs.run, transformer)
    return round(medians_ms({"": run}, bench.device, bench.rounds, warm_up=1)[""], 1)


def _measure_vae(bench: _Bench, size: str) -> None:
    """Measure diffusers' decoding of 81 frames in float32, as it loads this VAE."""
    width, height = parse_size(size)
    channels = {"base_dim": 8} if bench.divide > 1 else {}
    with bench.device:
        vae = AutoencoderKLWan(**channels).eval()
    frames = latent_frames(5 if bench.divide > 1 else 81)
    latents = torch.randn(1, 16, frames, height // 8, width // 8, device=bench.device)
    decode = partial(vae.decode, latents, return_dict=False)
    ms = medians_ms({"": decode}, bench.device, bench.rounds, warm_up=1)[""]
    bench.keep(f"{size}: diffusers, VAE", round(ms / 1000, 3), "s")


def _free(device: torch.device) -> None:
    gc.collect()
    synchronize(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()


if __name__ == "__main__":
    typer.run(main)
