"""What a configuration and the memory say about where parts live is what the engine does."""

from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

from tests.support.job_controls import Unwatched
from tests.support.requests import OWNER, order
from worker.config import WorkerConfig
from worker.device import Device
from worker.engine.offload import OffloadedModule
from worker.engine.wan_engine import WanEngine
from worker.errors import TooLittleMemory
from worker.startup import load_engine


def with_model(config: WorkerConfig, **values: object) -> WorkerConfig:
    return config.model_copy(update={"model": config.model.model_copy(update=values)})


@pytest.mark.parametrize("place", ["host", "encode"])
def test_the_text_encoder_gives_the_same_wherever_it_lives(
    config: WorkerConfig, engine: WanEngine, device: Device, place: str
) -> None:
    other = load_engine(with_model(config, text_encoder=place), device)
    assert other.parts.text_encoder_place == place
    for prompt in ("a small red circle", "a large blue square"):  # also after it has been away
        request = order(prompt=prompt)
        pairs = zip(
            other.prompts.encode(request, Unwatched(), OWNER),
            engine.prompts.encode(request, Unwatched(), OWNER),
            strict=True,
        )
        for ours, theirs in pairs:
            assert ours is not None
            assert theirs is not None
            assert torch.equal(ours, theirs)


class Stopping(Unwatched):
    """Stops as soon as it may."""

    def check(self) -> None:
        raise KeyboardInterrupt


def test_a_job_that_stops_while_it_encodes_leaves_the_encoder_fit(
    config: WorkerConfig, engine: WanEngine, device: Device
) -> None:
    other = load_engine(with_model(config, text_encoder="encode"), device)
    with pytest.raises(KeyboardInterrupt):
        other.prompts.encode(order(), Stopping(), OWNER)
    ours, _ = other.prompts.encode(order(), Unwatched(), OWNER)
    theirs, _ = engine.prompts.encode(order(), Unwatched(), OWNER)
    assert torch.equal(ours, theirs)


def test_the_encoder_visits_the_device_only_for_what_is_new(
    config: WorkerConfig, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = load_engine(with_model(config, text_encoder="encode"), device).prompts
    visits: list[OffloadedModule] = []
    lend = OffloadedModule.on_device

    def noted(visitor: OffloadedModule) -> AbstractContextManager[nn.Module]:
        visits.append(visitor)
        return lend(visitor)

    monkeypatch.setattr(OffloadedModule, "on_device", noted)
    for prompt, expected in (("red", 1), ("red", 1), ("blue", 2)):
        prompts.encode(order(prompt=prompt), Unwatched(), OWNER)
        assert len(visits) == expected


@dataclass(frozen=True, slots=True)
class SmallDevice(Device):
    """A CPU that counts its memory, and has little of it."""

    room: int = 0

    def available_bytes(self) -> int:
        return self.room


def test_what_does_not_fit_is_refused_before_anything_is_loaded(
    config: WorkerConfig, device: Device
) -> None:
    small = SmallDevice(device.kind, device.name, room=1 << 30)
    with pytest.raises(TooLittleMemory, match=r"needs .* GiB .* which has 1\.0 GiB\. To make it"):
        load_engine(config, small)
    load_engine(config, replace(small, room=16 << 30))


def test_tiling_is_what_the_configuration_says(config: WorkerConfig, device: Device) -> None:
    for wanted, tiled in (("on", True), ("off", False), ("auto", False)):
        engine = load_engine(with_model(config, vae_tiling=wanted), device)
        assert engine.parts.vae_tiling is tiled
