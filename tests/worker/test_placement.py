"""What a configuration and the memory say about where parts live is what the engine does."""

from dataclasses import dataclass, replace

import pytest
import torch

from tests.worker.orders import order
from worker.config import WorkerConfig
from worker.devices import Device
from worker.errors import TooLittleMemory
from worker.wan import WanEngine


def with_model(config: WorkerConfig, **values: object) -> WorkerConfig:
    return config.model_copy(update={"model": config.model.model_copy(update=values)})


def nothing() -> None: ...


@pytest.mark.parametrize("place", ["host", "encode"])
def test_the_text_encoder_gives_the_same_wherever_it_lives(
    config: WorkerConfig, engine: WanEngine, device: Device, place: str
) -> None:
    other = WanEngine.load(with_model(config, text_encoder=place), device)
    assert other.parts.text_encoder_place == place
    for prompt in ("a small red circle", "a large blue square"):  # also after it has been away
        request = order(prompt=prompt)
        pairs = zip(
            other.prompts.encode(request, nothing),
            engine.prompts.encode(request, nothing),
            strict=True,
        )
        for ours, theirs in pairs:
            assert ours is not None
            assert theirs is not None
            assert torch.equal(ours, theirs)


def test_a_job_that_stops_while_it_encodes_leaves_the_encoder_fit(
    config: WorkerConfig, engine: WanEngine, device: Device
) -> None:
    other = WanEngine.load(with_model(config, text_encoder="encode"), device)

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        other.prompts.encode(order(), stop)
    ours, _ = other.prompts.encode(order(), nothing)
    theirs, _ = engine.prompts.encode(order(), nothing)
    assert torch.equal(ours, theirs)


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
        WanEngine.load(config, small)
    WanEngine.load(config, replace(small, room=16 << 30))


def test_tiling_is_what_the_configuration_says(config: WorkerConfig, device: Device) -> None:
    for wanted, tiled in (("on", True), ("off", False), ("auto", False)):
        engine = WanEngine.load(with_model(config, vae_tiling=wanted), device)
        assert engine.parts.vae_tiling is tiled
