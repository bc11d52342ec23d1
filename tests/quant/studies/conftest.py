"""Provide the miniature's transformer and points for it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel

from quant.studies.points import Point

MINIATURE = Path("models/wan-mini")


@pytest.fixture(scope="module", autouse=True)
def one_thread_for_fixtures() -> Iterator[None]:
    """Use one thread in fixtures that several tests share, too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def load_transformer(model: Path) -> Any:
    """Load the transformer of a pipeline's folder in BF16, on the CPU."""
    transformer = WanTransformer3DModel.from_pretrained(
        model / "transformer", torch_dtype=torch.bfloat16
    )
    return transformer.eval().requires_grad_(False)


def random_point(seed: int = 0, step: int = 5) -> Point:
    """Make a small point with random latents and text for the miniature."""
    config = WanTransformer3DModel.load_config(MINIATURE / "transformer")
    draw = torch.Generator().manual_seed(seed)
    latents = torch.randn(1, config["in_channels"], 2, 4, 4, generator=draw)
    text = torch.randn(1, 8, config["text_dim"], generator=draw).bfloat16()
    return Point("a prompt", seed, step, "prompt", latents, torch.tensor([500.0]), text)
