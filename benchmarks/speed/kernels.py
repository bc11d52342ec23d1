"""Measure the parts of a block on a device: `python -m benchmarks.speed.kernels`.

Measured are matrix products in E4M3, with and without the rounding of their input, against
`F.linear` in BF16; the kernels' attention, in BF16 and in E4M3, against torch's; and each fused
kernel against the same arithmetic in plain torch. A GPU has to run FP8 attention (Hopper).

It prints a table, then the result as one line of JSON, and saves it in benchmarks/results/.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import quant
from benchmarks import report
from benchmarks.report import Row
from benchmarks.timing import device_name, medians_ms
from quant.kernels.eager import EagerKernels
from quant.kernels.interface import AttentionScales, BlockLinear, Kernels, Norm
from quant.kernels.selection import pick_kernels
from quant.numerics.scaling import choose_scale, scale_policy

WIDTH, WIDE, HEADS = 5120, 13824, 40
TOKENS = (32_760, 75_600)
"""The sequence lengths of 81 frames at 832x480 and at 1280x720."""
SCALE = 0.25
ATTENTION_SCALES = AttentionScales(SCALE, SCALE, SCALE)


def main(
    device: str = "cuda",
    rounds: Annotated[int, typer.Option(min=1)] = 15,
    divide: Annotated[int, typer.Option(min=1, help="Divide all sizes, for a rehearsal.")] = 1,
) -> None:
    """Measure all parts and write the result."""
    target = torch.device(device)
    kernels = pick_kernels(target, quantized=True, fp8_attention=True).kernels
    rows: list[Row] = []
    with torch.no_grad():
        for tokens in TOKENS:
            parts = BlockParts(target, kernels, tokens // divide, divide, rounds)
            for part in (parts.products(), parts.attention(), parts.fused_kernels()):
                rows += report.log_rows(part)
    settings = {"rounds": rounds, "divide": divide, "kernels": kernels.name}
    document = report.result("kernels", device_name(target), settings, rows)
    report.print_table(rows)
    report.save(document)
    print(json.dumps(document))


class BlockParts:
    """The parts of a block at one number of tokens."""

    def __init__(
        self, device: torch.device, kernels: Kernels, tokens: int, divide: int, rounds: int
    ) -> None:
        self.device, self.kernels, self.tokens, self.rounds = device, kernels, tokens, rounds
        self.heads = max(1, HEADS // divide)
        self.width, self.wide = self.heads * 128, max(128, WIDE // divide // 128 * 128)
        self.eager = EagerKernels()

    def ms(self, runs: dict[str, Callable[[], object]]) -> dict[str, float]:
        return medians_ms(runs, self.device, self.rounds, queued=True)

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=torch.bfloat16)

    def products(self) -> Iterator[Row]:
        """Measure the linears of a block, each with the rounding of its input."""
        for name, width, out in (
            ("q, k and v", self.width, 3 * self.width),
            ("output", self.width, self.width),
            ("feed-forward, up", self.width, self.wide),
            ("feed-forward, down", self.wide, self.width),
        ):
            linear = nn.Linear(width, out, device=self.device, dtype=torch.bfloat16)
            x = self.randn(1, self.tokens, width)
            amax = x.abs().amax().float()
            policy = scale_policy("pow2")
            quantized = quant.Hif8Linear.from_linear(
                linear,
                choose_scale(policy, linear.weight.detach().abs().amax()),
                act_scale=choose_scale(policy, amax),
                act_policy=policy,
            )
            product = self.kernels.quantized([quantized])
            rounded = self.kernels.round_act(x, product.act_scale)
            flop = 2 * self.tokens * width * out
            ms = self.ms(
                {
                    "bf16": partial(linear, x),
                    "hif8": partial(product, rounded),
                    "both": partial(self._round_and_multiply, product, x),
                }
            )
            where = f"{name} [{self.tokens},{width}]x[{width},{out}]"
            yield Row(f"{where}: HiF8 with its rounding", ms["both"], "ms", baseline=ms["bf16"])
            yield Row(f"{where}: HiF8 alone", ms["hif8"], "ms", baseline=ms["bf16"])
            yield Row(f"{where}: HiF8 alone", round(flop / ms["hif8"] / 1e9), "TFLOP/s")

    def _round_and_multiply(self, product: BlockLinear, x: Tensor) -> Tensor:
        return product(self.kernels.round_act(x, product.act_scale))

    def attention(self) -> Iterator[Row]:
        """Measure self-attention, and torch's default for the same tensors."""
        q, k, v = (self.randn(1, self.tokens, self.heads, 128) for _ in range(3))
        q2, k2, v2 = (x.transpose(1, 2) for x in (q, k, v))
        q8, k8, v8 = (self.kernels.round_act(x, SCALE) for x in (q, k, v))
        attend = self.kernels.attention
        ms = self.ms(
            {
                "torch": partial(scaled_dot_product_attention, q2, k2, v2),
                "BF16": partial(attend, q, k, v, None, None),
                "FP8": partial(attend, q8, k8, v8, ATTENTION_SCALES, None),
            }
        )
        flop = 4 * self.tokens**2 * self.width
        for name in ("BF16", "FP8"):
            where = f"attention over {self.tokens} tokens, {name}"
            yield Row(f"{where} (baseline: torch's, BF16)", ms[name], "ms", baseline=ms["torch"])
            yield Row(where, round(flop / ms[name] / 1e9), "TFLOP/s")

    def fused_kernels(self) -> Iterator[Row]:
        """Measure the fused kernels between the products, and the same steps in plain torch."""
        x, delta = (self.randn(1, self.tokens, self.width) for _ in range(2))
        wide, qkv = (
            self.randn(1, self.tokens, self.wide),
            self.randn(1, self.tokens, 3 * self.width),
        )
        factor = torch.randn(1, self.width, device=self.device)
        norm = Norm(factor, factor, 1e-6, plus_one=True)
        weights = nn.RMSNorm(self.width, eps=1e-6).to(self.device, torch.bfloat16)
        angles = torch.rand(1, self.tokens, 1, 128, device=self.device)
        calls: dict[str, Any] = {
            "norm and rounding": lambda k: k.add_norm(x, None, None, norm, SCALE),
            "gated sum, norm and rounding": lambda k: k.add_norm(x, delta, factor, norm, SCALE),
            "GELU and rounding": lambda k: k.gelu(wide, SCALE),
            "norms, rotary embedding and rounding of q, k and v": lambda k: k.norm_rope(
                qkv, weights, weights, (angles, angles), self.heads, ATTENTION_SCALES
            ),
        }
        for name, run in calls.items():
            ms = self.ms({"eager": partial(run, self.eager), "ours": partial(run, self.kernels)})
            what = f"{name}, {self.tokens} tokens (baseline: plain torch)"
            yield Row(what, ms["ours"], "ms", baseline=ms["eager"])


if __name__ == "__main__":
    typer.run(main)
