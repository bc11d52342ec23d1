"""Give a transformer outliers without changing what it computes, to test methods on them.

A channel is made larger in one place and smaller in the next weights, by a power of two, so that no
bit of any product is lost. Wan's blocks have three places where this is possible for one block
alone: the norm before cross-attention and its `to_q`, and in both attentions `to_v` and `to_out`.
The other norms are modulated by one projection of the timestep for all blocks, GELU is not
homogeneous, and between q and k stands no quantized linear.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quant.errors import StudyError
from quant.numerics.scaling import is_power_of_two
from quant.studies.block_stream import BlockStream
from quant.studies.points import Point
from quant.studies.protection.block_sets import middle_set, paper_sets

LARGEST_DIFFERENCE = 1e-5
"""How much the velocity may change, as a share of its largest value, in float32."""

_PLACES = (
    ("norm2", "attn2.to_q"),
    ("attn1.to_v", "attn1.to_out.0"),
    ("attn2.to_v", "attn2.to_out.0"),
)
"""Modules whose outputs are enlarged, each with the linear that takes them."""


@dataclass(frozen=True, slots=True)
class Outliers:
    """What is injected.

    Attributes:
        blocks: numbers of the blocks.
        channels: how many channels in each place.
        factor: a power of two from 2 to 1,024.
        seed: which channels are chosen.
    """

    blocks: tuple[int, ...]
    channels: int
    factor: float
    seed: int = 0


def blocks_of(where: str, blocks: int) -> tuple[int, ...]:
    """Return the blocks that the paper protects ("ends"), or as many in the middle ("middle")."""
    ends = paper_sets(blocks)["both ends"]
    return ends if where == "ends" else middle_set(blocks, len(ends))


@torch.no_grad()
def inject(transformer: Any, outliers: Outliers) -> int:
    """Change a transformer in place; return how many channels were enlarged.

    Raises:
        StudyError: the factor or the number of channels is out of bounds.
    """
    factor = outliers.factor
    if not 2 <= factor <= 1024 or not is_power_of_two(factor):
        raise StudyError(
            f"the factor {factor:g} must be a power of two from 2 to 1024, such as 64: others "
            "would change the bits of weights"
        )
    width = transformer.config.num_attention_heads * transformer.config.attention_head_dim
    if not 1 <= outliers.channels <= width:
        raise StudyError(f"{outliers.channels} channels must be between 1 and {width}")
    draw = random.Random(outliers.seed)
    enlarged = 0
    for index in outliers.blocks:
        block = transformer.blocks[index]
        for source, target in _PLACES:
            channels = sorted(draw.sample(range(width), outliers.channels))
            module = block.get_submodule(source)
            if isinstance(module, nn.Identity):
                continue  # a model without the norm before cross-attention
            for tensor in (module.weight, module.bias):
                tensor[channels] *= factor
            block.get_submodule(target).weight[:, channels] /= factor
            enlarged += len(channels)
    return enlarged


def velocity_of(transformer: Any, dtype: torch.dtype | None) -> Tensor:
    """Return the velocity of fixed random latents, on the CPU, one block at a time.

    Args:
        dtype: as in `BlockStream`.
    """
    draw = torch.Generator().manual_seed(0)
    config = transformer.config
    latents = torch.randn(1, config.in_channels, 2, 8, 8, generator=draw)
    text = torch.randn(1, 16, config.text_dim, generator=draw).bfloat16()
    point = Point("", 0, 0, "prompt", latents, torch.tensor([500.0]), text)
    return BlockStream(transformer, torch.device("cpu"), dtype).velocity([point])


def difference(found: Tensor, reference: Tensor) -> float:
    """Return the largest difference as a share of the reference's largest magnitude."""
    change = (found.float() - reference.float()).abs().amax()
    return float(change / reference.float().abs().amax())
