"""Test that weights with NaN or infinite numbers are refused after loading, with their name."""

from __future__ import annotations

import pytest
import torch

from worker.device import Device
from worker.engine.wan_engine import WanEngine
from worker.errors import ModelUnusable
from worker.model_loader import finite_weights
from worker.model_loader.finite_weights import check_finite
from worker.startup import load_engine

DAMAGED = [
    ("vae", "decoder.conv_out.bias", "VAE"),
    ("vae", "encoder.conv_in.weight", "VAE"),
    ("text_encoder", "shared.weight", "text encoder"),
    ("transformer", "blocks.7.attn1.norm_q.weight", "transformer of mode 'bf16'"),
]


@pytest.mark.parametrize(("part", "tensor", "named"), DAMAGED)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_part_with_one_such_number_is_refused(
    edited, device: Device, part: str, tensor: str, named: str, value: float
) -> None:
    edited.set_number(part, tensor, value)
    last = tensor.rpartition(".")[2]
    message = rf"{named} has values that are NaN or infinite in the tensor '.*{last}': .*damaged"
    with pytest.raises(ModelUnusable, match=message):
        load_engine(edited.with_modes("bf16"), device)


def test_large_numbers_whose_sum_overflows_are_accepted(
    engine: WanEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    bias = engine.components.vae.encoder.conv_in.bias
    monkeypatch.setattr(bias, "data", torch.full_like(bias, 3e38))
    assert bias.sum().isinf()
    check_finite(engine.components, list(engine.loaded.values()))


def test_what_is_large_on_the_host_is_left_to_the_jobs(
    engine: WanEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    bias = engine.components.vae.encoder.conv_in.bias
    monkeypatch.setattr(bias, "data", torch.full_like(bias, torch.nan))
    modes = list(engine.loaded.values())
    with pytest.raises(ModelUnusable, match="VAE"):
        check_finite(engine.components, modes)
    monkeypatch.setattr(finite_weights, "HOST_LIMIT_BYTES", 1000)
    check_finite(engine.components, modes)
