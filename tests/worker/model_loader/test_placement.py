"""Test that the engine follows the configured and computed placement of its components."""

from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

from tests.support.job_controls import IgnoringControl
from tests.support.requests import OWNER, generation_request
from worker.config import WorkerConfig
from worker.device import Device
from worker.engine.offload import OffloadedModule
from worker.engine.wan_engine import WanEngine
from worker.errors import TooLittleMemory
from worker.startup import load_engine


def with_model(config: WorkerConfig, **values: object) -> WorkerConfig:
    return config.model_copy(update={"model": config.model.model_copy(update=values)})


@pytest.mark.parametrize("placement", ["host", "encode"])
def test_the_text_encoder_gives_the_same_wherever_it_is(
    config: WorkerConfig, engine: WanEngine, device: Device, placement: str
) -> None:
    other = load_engine(with_model(config, text_encoder=placement), device)
    assert other.components.text_encoder_placement == placement
    # The second prompt is encoded after the encoder was offloaded.
    for prompt in ("a small red circle", "a large blue square"):
        request = generation_request(prompt=prompt)
        pairs = zip(
            other.prompts.encode(request, IgnoringControl(), OWNER),
            engine.prompts.encode(request, IgnoringControl(), OWNER),
            strict=True,
        )
        for ours, theirs in pairs:
            assert ours is not None
            assert theirs is not None
            assert torch.equal(ours, theirs)


class StoppingControl(IgnoringControl):
    """A control that stops the job at the first check."""

    def check(self) -> None:
        raise KeyboardInterrupt


def test_a_job_that_stops_while_it_encodes_leaves_the_encoder_usable(
    config: WorkerConfig, engine: WanEngine, device: Device
) -> None:
    other = load_engine(with_model(config, text_encoder="encode"), device)
    with pytest.raises(KeyboardInterrupt):
        other.prompts.encode(generation_request(), StoppingControl(), OWNER)
    ours, _ = other.prompts.encode(generation_request(), IgnoringControl(), OWNER)
    theirs, _ = engine.prompts.encode(generation_request(), IgnoringControl(), OWNER)
    assert torch.equal(ours, theirs)


def test_the_encoder_is_copied_to_the_device_only_for_new_texts(
    config: WorkerConfig, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = load_engine(with_model(config, text_encoder="encode"), device).prompts
    uses: list[OffloadedModule] = []
    on_device = OffloadedModule.on_device

    def recorded(module: OffloadedModule) -> AbstractContextManager[nn.Module]:
        uses.append(module)
        return on_device(module)

    monkeypatch.setattr(OffloadedModule, "on_device", recorded)
    for prompt, expected in (("red", 1), ("red", 1), ("blue", 2)):
        prompts.encode(generation_request(prompt=prompt), IgnoringControl(), OWNER)
        assert len(uses) == expected


@dataclass(frozen=True, slots=True)
class SmallDevice(Device):
    """A CPU with a limited memory."""

    capacity: int = 0

    def available_bytes(self) -> int:
        return self.capacity


def test_what_does_not_fit_is_refused_before_anything_is_loaded(
    config: WorkerConfig, device: Device
) -> None:
    small = SmallDevice(device.kind, device.name, capacity=1 << 30)
    with pytest.raises(TooLittleMemory, match=r"needs .* GiB .* which has 1\.0 GiB\. To make it"):
        load_engine(config, small)
    load_engine(config, replace(small, capacity=16 << 30))


def test_tiling_is_what_the_configuration_says(config: WorkerConfig, device: Device) -> None:
    for configured, tiled in (("on", True), ("off", False), ("auto", False)):
        engine = load_engine(with_model(config, vae_tiling=configured), device)
        assert engine.components.vae_tiling is tiled
