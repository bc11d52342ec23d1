"""Count the bytes that vector units move in a block: `python -m benchmarks.speed.vector_traffic`.

On an Ascend 910B matrix products are fast and what lies between them is not, so the bytes of that
decide what HiFloat8 costs. They are counted for a block of Wan2.1-T2V-14B at 832x480 and 81 frames,
for each choice of kernels and of how weights are held. Nothing is measured: seconds are the bytes
over an assumed bandwidth, beside a published time of a whole step.

It prints a table, then the result as one line of JSON, and saves it in benchmarks/results/.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
import typer
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from torch import nn

from benchmarks import report
from benchmarks.fixtures.traffic_counter import (
    AsOnAscend,
    CountedKernel,
    Launch,
    Traffic,
    TrafficCounter,
    shapes_of_torch_npu,
)
from benchmarks.report import Row
from jobs.geometry import parse_size, sequence_tokens
from quant.kernels import ascend_triton
from quant.kernels.ascend import AscendKernels, RankLinear
from quant.kernels.ascend_triton import AscendTritonKernels
from quant.kernels.eager import EagerKernels
from quant.kernels.interface import BlockLinear, Kernels
from quant.kernels.joined_linear import joined_bias
from quant.numerics.linear import Hif8Linear
from quant.numerics.scaling import POLICIES
from quant.transformer.wan_block import FusedWanBlock
from quant.transformer.weight_storage import decode_weights

WIDTH, HEADS, WIDE = 5120, 40, 13824
TEXT_TOKENS = 512
SIZE, FRAMES = "832x480", 81
BLOCKS, QUANTIZED_BLOCKS, PASSES = 40, 35, 2  # passes of a step: with guidance
BANDWIDTH = 1.2e12
"""Bytes a second that vector units are assumed to move; the 910B's memory has 1.6e12."""
VECTOR_CORES = 48
PUBLISHED_STEP_S = 17.2
"""A published run of this model, size and length: 860 s for 50 steps on one 910B, in BF16."""
LOOK_UPS_PER_S = 16e6 / 12.15e-3
"""Values that a table look-up gives in a second: published, 16M in 12.15 ms on one 910B3."""


@dataclass(frozen=True, slots=True)
class Case:
    """One choice of kernels and weights.

    Attributes:
        kernels: None for diffusers' own block.
        storage: of quantized weights; None for BF16.
    """

    name: str
    kernels: Kernels | None
    storage: str | None = None


def main() -> None:
    """Count all cases and write the result."""
    counted = count_all()
    rows = list(rows_of(counted))
    settings = {
        "size": SIZE,
        "frames": FRAMES,
        "bandwidth_bytes_per_s": BANDWIDTH,
        "published_step_s": PUBLISHED_STEP_S,
        "quantized_blocks": QUANTIZED_BLOCKS,
    }
    document = report.result("vector-traffic", "counted", settings, rows)
    report.print_table(rows)
    print(markdown(counted))
    report.save(document)
    print(json.dumps(document))


def count_all(width: int = WIDTH, tokens: int | None = None) -> dict[str, Traffic]:
    """Count a block's traffic for each case, by the case's name.

    Args:
        width, tokens: by default the 14B's; the other sizes follow the width.
    """
    tokens = tokens or sequence_tokens(*parse_size(SIZE), FRAMES)
    return {case.name: count(case, width, tokens) for case in cases()}


def cases() -> list[Case]:
    """Return the cases, BF16 on the same kernels before its quantized ones."""
    eager, plain = EagerKernels(), MetaAscendKernels()
    triton = MetaTritonKernels(VECTOR_CORES)
    return [
        Case("bf16, diffusers' blocks", None),
        Case("w8a8 packed, diffusers' blocks", None, "packed"),
        Case("bf16, eager", eager),
        Case("w8a8 packed, eager", eager, "packed"),
        Case("w8a8 bf16_grid, eager", eager, "bf16_grid"),
        Case("bf16, ascend", plain),
        Case("w8a8 packed, ascend", plain, "packed"),
        Case("w8a8 bf16_grid, ascend", plain, "bf16_grid"),
        Case("bf16, ascend+triton", triton),
        Case("w8a8 packed, ascend+triton", triton, "packed"),
        Case("w8a8 bf16_grid, ascend+triton", triton, "bf16_grid"),
    ]


@dataclass(frozen=True, slots=True)
class Estimate:
    """Seconds a step, from one case's bytes.

    Attributes:
        over_bf16: beyond BF16 on the same kernels.
        over_published: beyond the published step, in which diffusers' blocks run in BF16.
    """

    over_bf16: float
    over_published: float

    @property
    def share(self) -> float:
        """The whole step, as a share of the published one."""
        return 1 + self.over_published / PUBLISHED_STEP_S


def estimate(counted: dict[str, Traffic], name: str) -> Estimate:
    """Estimate a case's seconds; its protected blocks run in BF16 on the same kernels."""
    traffic, bf16 = counted[name], counted["bf16, " + name.partition(", ")[2]]
    quantized = PASSES * QUANTIZED_BLOCKS
    over_bf16 = quantized * (traffic.vector_bytes - bf16.vector_bytes) / BANDWIDTH
    over_bf16 += quantized * traffic.looked_up / LOOK_UPS_PER_S
    published = counted["bf16, diffusers' blocks"].vector_bytes
    saved = PASSES * BLOCKS * (published - bf16.vector_bytes) / BANDWIDTH
    return Estimate(over_bf16, over_bf16 - saved)


def rows_of(counted: dict[str, Traffic]) -> Iterator[Row]:
    """Return the bytes of each case, and the seconds that follow from them."""
    for name, traffic in counted.items():
        bf16, seconds = counted["bf16, " + name.partition(", ")[2]], estimate(counted, name)
        gigabytes, before = (round(each.vector_bytes / 1e9, 1) for each in (traffic, bf16))
        yield Row(f"{name}: a block", gigabytes, "GB", baseline=before)
        yield Row(f"{name}: a block", traffic.calls, "operations", baseline=bf16.calls)
        yield Row(f"{name}: over bf16 on these kernels", round(seconds.over_bf16, 2), "s/step")
        yield Row(f"{name}: over the published step", round(seconds.over_published, 2), "s/step")
        yield Row(f"{name}: of the published step", round(100 * seconds.share, 1), "%")
        yield Row(f"{name}: alive at the peak", round(traffic.peak_bytes / 2**30, 2), "GiB")


def markdown(counted: dict[str, Traffic]) -> str:
    """Return the table of `docs/ascend.md`."""
    lines = [
        "| kernels, mode and weights | GB a block | operations | over `bf16` on these kernels "
        "| over the published step | of it |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name, traffic in counted.items():
        mode, _, kernels = name.partition(", ")
        seconds = estimate(counted, name)
        own = "–" if mode == "bf16" else f"{seconds.over_bf16:+.1f} s"
        lines.append(
            f"| {kernels}, {mode} | {traffic.vector_bytes / 1e9:.1f} | {traffic.calls:,} | {own} "
            f"| {seconds.over_published:+.1f} s | {seconds.share:.0%} |"
        )
    return "\n".join(lines)


def count(case: Case, width: int, tokens: int) -> Traffic:
    """Count one pass of a block, its prompt cached."""
    block = meta_block(width, quantized=case.storage is not None)
    if case.storage == "bf16_grid":
        decode_weights(block)
    if case.kernels is not None:
        block = FusedWanBlock(block, case.kernels)
    with torch.device("meta"):
        x = torch.empty(1, tokens, width, dtype=torch.bfloat16)
        prompt = torch.empty(1, TEXT_TOKENS, width, dtype=torch.bfloat16)
        time = torch.empty(1, 6, width, dtype=torch.bfloat16)
        rope = (torch.empty(1, tokens, 1, 128), torch.empty(1, tokens, 1, 128))
    with ExitStack() as opened:
        opened.enter_context(torch.no_grad())
        opened.enter_context(shapes_of_torch_npu())
        opened.enter_context(AsOnAscend())
        counter = TrafficCounter()
        opened.enter_context(counted_launches(counter))
        # The prompt's keys and values are cached.
        block(x[:, :1], prompt, time, (rope[0][:, :1], rope[1][:, :1]))
        counter.traffic = Traffic()
        opened.enter_context(counter)
        block(x, prompt, time, rope)
    return counter.traffic


def meta_block(width: int, *, quantized: bool) -> Any:
    """Build a block on the meta device; scales are real, because kernels read them."""
    with torch.device("meta"):
        block = WanTransformerBlock(
            dim=width,
            ffn_dim=width * WIDE // WIDTH,
            num_heads=width // 128,
            qk_norm="rms_norm_across_heads",
            cross_attn_norm=True,
        ).to(torch.bfloat16)
        block.norm2.float()
        block.scale_shift_table.data = block.scale_shift_table.data.float()
    if quantized:
        for parent in list(block.modules()):
            for name, child in list(parent.named_children()):
                if type(child) is nn.Linear:
                    parent.register_module(name, _quantized(child))
    return block.eval().requires_grad_(False)


def _quantized(linear: nn.Linear) -> Hif8Linear:
    return Hif8Linear(
        torch.empty(linear.weight.shape, dtype=torch.uint8, device="meta"),
        torch.tensor(0.25),
        act_scale=torch.tensor(0.25),
        act_policy=POLICIES["pow2"],
        bias=linear.bias,
    )


class _MetaRankLinear(RankLinear):
    """A product of ranks without data: what reads the weights at the start is left out."""

    def __init__(self, linears: list[Hif8Linear], kernels: AscendKernels) -> None:
        nn.Module.__init__(self)
        self._kernels = kernels
        self._rows = [each.out_features for each in linears]
        self.act_scale, self._scales = 0.25, [0.25] * len(linears)
        shape = sum(self._rows), linears[0].in_features
        self.register_buffer("ranks", torch.empty(shape, dtype=torch.int8, device="meta"))
        self.register_buffer("row_scale", None)
        self.bias = joined_bias(linears)
        self.weight_ahead = None


class MetaAscendKernels(AscendKernels):
    """`AscendKernels` for weights without data."""

    def quantized(self, linears: Any) -> BlockLinear:
        return _MetaRankLinear(list(linears), self)


class MetaTritonKernels(AscendTritonKernels):
    """`AscendTritonKernels` for weights without data."""

    def quantized(self, linears: Any) -> BlockLinear:
        return _MetaRankLinear(list(linears), self)


LAUNCHES = {
    "_elementwise": Launch({"x_ptr": None}, {"out_ptr": None}),
    "_add_gated": Launch({"x_ptr": None, "delta_ptr": None, "gate_ptr": None}, {"out_ptr": None}),
    "_add_norm": Launch(
        {
            "x_ptr": None,
            "delta_ptr": itemgetter("HAS_DELTA"),
            "gate_ptr": itemgetter("HAS_GATE"),
            "factor_ptr": None,
            "shift_ptr": None,
        },
        {"sum_ptr": itemgetter("HAS_DELTA"), "out_ptr": None},
    ),
    "_decode": Launch(
        {"ranks_ptr": None, "scale_ptr": lambda given: given["SCALE"] == ascend_triton.BY_ROW},
        {"out_ptr": None},
    ),
}
"""What each kernel of `quant.kernels.ascend_triton` reads and writes."""


@contextmanager
def counted_launches(counter: TrafficCounter) -> Iterator[None]:
    """Have launches of the Triton kernels be counted instead of run."""
    kernels = {name: getattr(ascend_triton, name) for name in LAUNCHES}
    for name, launch in LAUNCHES.items():
        setattr(ascend_triton, name, CountedKernel(kernels[name], launch, counter))
    try:
        yield
    finally:
        for name, kernel in kernels.items():
            setattr(ascend_triton, name, kernel)


if __name__ == "__main__":
    typer.run(main)
