"""Test the storage of quantized weights: the same frames, its bytes, its choice and its refusal."""

import numpy as np
import pytest

from quant import QuantRecipe
from quant.numerics.grid_linear import GridLinear
from tests.support.job_controls import IgnoringControl
from tests.support.requests import OWNER, generation_request
from worker.config import ModelConfig, WorkerConfig
from worker.device import Device
from worker.engine.wan_engine import WanEngine
from worker.errors import ModelUnusable
from worker.model_loader.memory_plan import (
    allowed_storages,
    check_follower,
    measure_model,
    place_model,
)
from worker.startup import load_engine

RECIPE = QuantRecipe.load("boundary-hif8")


class EmulatingDevice(Device):
    """An accelerator that multiplies decoded weights, as an Ascend 910B."""

    emulates = True
    multiplies_codes = False


class MultiplyingDevice(Device):
    """A device that multiplies the codes, as a GPU with FP8 tensor cores."""

    emulates = False
    multiplies_codes = True


EMULATING = EmulatingDevice("npu", "an NPU")
MULTIPLYING = MultiplyingDevice("cuda", "a GPU")


def configured(config: WorkerConfig, storage: str, *modes: str) -> WorkerConfig:
    chosen = tuple(mode for mode in config.modes if mode.name in (modes or ("w8a8",)))
    model = config.model.model_copy(update={"weight_storage": storage, "default_mode": "w8a8"})
    return config.model_copy(update={"modes": chosen, "model": model})


def recipes_of(config: WorkerConfig) -> list[QuantRecipe | None]:
    return [None if mode.recipe is None else RECIPE for mode in config.modes]


def storages(config: WorkerConfig, device: Device, available: int | None = 1) -> list[str]:
    return list(allowed_storages(config, recipes_of(config), device, available))


def test_decoded_weights_make_the_same_frames(
    config: WorkerConfig, engine: WanEngine, device: Device
) -> None:
    """`engine` holds codes, because `bf16` is beside."""
    decoded = load_engine(configured(config, "bf16_grid"), device)
    assert decoded.model.fingerprint == engine.model.fingerprint
    assert decoded.modes[0] == engine.modes[1], "callers are offered the same"
    request = generation_request(
        mode="w8a8", size="96x96", num_frames=1, num_inference_steps=2, guidance_scale=4.0, seed=7
    )
    clips = [each.generate(request, IgnoringControl(), OWNER) for each in (decoded, engine)]
    ours, theirs = (np.stack(list(clip.frames)) for clip in clips)
    assert np.array_equal(ours, theirs)
    assert clips[0].act_shares == clips[1].act_shares is not None
    transformer = decoded.loaded["w8a8"].transformer
    assert sum(isinstance(each, GridLinear) for each in transformer.modules()) == 350


def test_decoded_weights_take_what_is_planned(config: WorkerConfig, device: Device) -> None:
    alone = configured(config, "bf16_grid")
    size = measure_model(alone, [RECIPE], device)
    (mode,) = load_engine(alone, device).loaded.values()
    assert mode.weight_bytes == pytest.approx(size.transformer + size.decoded_extra, rel=1e-3)


def test_they_are_chosen_where_w8a8_runs_alone_and_they_fit(config: WorkerConfig) -> None:
    alone = configured(config, "auto")
    assert storages(alone, EMULATING) == ["bf16_grid", "packed"]
    assert storages(configured(config, "auto", "bf16", "w8a8"), EMULATING) == ["packed"]
    assert storages(alone, MULTIPLYING) == ["packed"]
    assert storages(alone, EMULATING, None) == ["packed"], "nobody knows whether they fit"
    emulated = alone.modes[0].model_copy(update={"exact_emulation": True})
    exact = alone.model_copy(update={"modes": (emulated,)})
    assert storages(exact, MULTIPLYING) == ["bf16_grid", "packed"]


def test_the_best_that_fits_is_taken(config: WorkerConfig) -> None:
    alone = configured(config, "auto")
    size = measure_model(alone, [RECIPE], EMULATING)
    best = size.need("device", False, "bf16_grid").total
    for available, expected in ((best, "bf16_grid"), (best - size.text_encoder // 2, "bf16_grid")):
        placement = place_model(alone, [RECIPE], EMULATING, available)
        assert placement.weight_storage == expected
        assert not placement.vae_tiling
        assert "weights decoded to BF16 once" in str(placement)
    least = size.need("host", False, "bf16_grid").total - 1
    placement = place_model(alone, [RECIPE], EMULATING, least)
    assert (placement.weight_storage, placement.vae_tiling) == ("packed", False)
    follower = size.follower_need("bf16_grid").total
    assert check_follower(alone, [RECIPE], EMULATING, follower) == "bf16_grid"
    assert check_follower(alone, [RECIPE], EMULATING, follower - 1) == "packed"


def test_only_packed_weights_need_room_to_be_decoded(config: WorkerConfig) -> None:
    alone = configured(config, "auto")
    size = measure_model(alone, [RECIPE], EMULATING)
    packed, decoded = (size.need("host", False, each) for each in ("packed", "bf16_grid"))
    assert packed.resident["decoded weights"] == size.decoded_at_once > 0
    assert "decoded weights" not in decoded.resident
    assert measure_model(alone, [RECIPE], MULTIPLYING).decoded_at_once == 0


def test_a_configured_storage_is_kept_or_refused(config: WorkerConfig) -> None:
    both = ("bf16", "w8a8")
    for device in (EMULATING, MULTIPLYING):
        assert storages(configured(config, "packed"), device) == ["packed"]
    assert storages(configured(config, "bf16_grid", *both), EMULATING) == ["bf16_grid"]
    assert storages(configured(config, "bf16_grid"), EMULATING, None) == ["bf16_grid"]
    with pytest.raises(ModelUnusable, match=r'"bf16_grid".* none of w8a8 .*set it to "packed"'):
        storages(configured(config, "bf16_grid"), MULTIPLYING)
    with pytest.raises(ModelUnusable, match="none of bf16 "):
        storages(configured(config, "bf16_grid", "bf16"), EMULATING)


def test_the_setting_is_read_from_the_file_and_not_offered(config: WorkerConfig) -> None:
    assert config.model.weight_storage == "auto"
    assert "weight_storage" not in config.model.offer("sha256:00").model_dump()
    with pytest.raises(ValueError, match="'auto', 'packed' or 'bf16_grid'"):
        ModelConfig.model_validate(config.model.model_dump() | {"weight_storage": "fp4"})
