"""Provide the miniature's transformer and points for it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from typer.testing import CliRunner

from quant.cli import app
from quant.studies.points import Point

MINIATURE = Path("models/wan-mini")
CALIBRATION = [f"a {shape}" for shape in "abcdefgh"]
HELD_OUT = [f"the {shape}" for shape in "abcdefgh"]


@pytest.fixture(scope="module", autouse=True)
def one_thread_for_fixtures() -> Iterator[None]:
    """Use one thread in fixtures that several tests share, too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(*arguments: object) -> Any:
    """Run a command of the toolkit."""
    return CliRunner().invoke(app, [str(each) for each in arguments])


@pytest.fixture(scope="session")
def recorded(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Record points of the tiny model: 2 steps each of prompts to calibrate on and to test on."""
    folder = tmp_path_factory.mktemp("points")
    small = ["--steps", "4", "--keep", "2", "--frames", "1", "--size", "32x32"]
    for name, prompts in (("calibration", CALIBRATION), ("held-out", HELD_OUT)):
        (folder / f"{name}.txt").write_text("\n".join(prompts))
        result = run(
            *("record", "--model", tiny_model, "--prompts", folder / f"{name}.txt"),
            *("--out", folder / name, "--text-tokens", "16", *small),
        )
        assert result.exit_code == 0, result.output
    return {"calibration": folder / "calibration", "held-out": folder / "held-out"}


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
