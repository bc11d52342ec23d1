"""INT8 on a card: its products are the CPU's, and so, nearly, is a video."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from quant.kernels.int8.ascend import AscendInt8Product
from quant.numerics.int8 import token_scale
from quant.numerics.int8_linear import Int8Linear
from tests.npu.card.conftest import CONFIG
from tests.support.job_controls import IgnoringControl
from tests.support.requests import OWNER, generation_request
from worker.config import ModeConfig, WorkerConfig, load_config
from worker.device import Device, pick_device
from worker.startup import load_engine

pytestmark = pytest.mark.npu

LEAST_DB = 40.0
"""Between a card's operations, which round differently, and the CPU's; of frames."""

LAST_BIT = 2.0**-7
"""A card may round the last bit of BF16 otherwise."""


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 40])
def test_a_joined_product_is_that_of_the_linears_on_the_cpu(npu: Device, tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, tokens, 256, generator=generator).to(torch.bfloat16)
    x[0, 0] = 0  # a token of zeros
    linears = [nn.Linear(256, rows).to(torch.bfloat16) for rows in (96, 32)]
    int8 = [Int8Linear.from_linear(each, token_scale(each.weight.detach())) for each in linears]
    expected = torch.cat([each(x) for each in int8], dim=-1)
    product = AscendInt8Product([each.to(npu.torch_device) for each in int8])
    found = product(x.to(npu.torch_device)).cpu()
    assert found.dtype is torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=LAST_BIT, atol=0)


def int8_alone() -> WorkerConfig:
    config = load_config(CONFIG)
    mode = ModeConfig(
        name="int8",
        description="Weights and activations in INT8.",
        recipe="boundary-int8",
        scales=config.model.path / "scales" / "boundary-int8.safetensors",
    )
    model = config.model.model_copy(update={"default_mode": "int8"})
    return config.model_copy(update={"modes": (mode,), "model": model})


def frames(device: Device) -> np.ndarray:
    engine = load_engine(int8_alone(), device)
    assert engine.modes[0].warning is None
    request = generation_request(mode="int8", num_frames=1, num_inference_steps=2)
    return np.stack(list(engine.generate(request, IgnoringControl(), OWNER).frames))


def test_a_video_on_the_card_is_nearly_the_cpus(npu: Device) -> None:
    found, expected = frames(npu), frames(pick_device("cpu", threads=1))
    error = np.square(found.astype(float) - expected.astype(float)).mean()
    difference = 10 * np.log10(255**2 / error)
    assert difference >= LEAST_DB, f"{difference:.1f} dB"
