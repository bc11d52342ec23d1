"""Test the computed memory, the placement that follows from it, and the refusals."""

import json
import re
from pathlib import Path

import pytest
import torch

from quant import LoraSet, QuantRecipe
from quant.transformer.meta_model import shared_meta_model
from worker.config import FirstBlockCache, LoraConfig, ModeConfig, ModelConfig, WorkerConfig
from worker.device import Device
from worker.distributed import follower
from worker.distributed.follower import load_follower
from worker.engine.wan_engine import WanEngine
from worker.errors import TooLittleMemory
from worker.model_loader.memory_need import GIB, RESERVE_BYTES, ModelBytes
from worker.model_loader.memory_plan import (
    Placement,
    check_follower,
    measure_model,
    place_model,
)
from worker.model_loader.plan_table import Described

LARGE = {
    "num_layers": 40,
    "num_attention_heads": 40,
    "attention_head_dim": 128,
    "ffn_dim": 13824,
    "text_dim": 4096,
    "freq_dim": 256,
    "cross_attn_norm": True,
    "in_channels": 16,
    "out_channels": 16,
    "qk_norm": "rms_norm_across_heads",
}
RECIPE = QuantRecipe.load("boundary-hif8")


@pytest.fixture(scope="module")
def large_folder(tmp_path_factory) -> Path:
    """The 14B model's configurations, and sparse files of the right sizes."""
    folder = tmp_path_factory.mktemp("large")
    for part in ("transformer", "text_encoder", "vae"):
        (folder / part).mkdir()
    (folder / "transformer" / "config.json").write_text(json.dumps(LARGE))
    (folder / "vae" / "config.json").write_text("{}")
    for part, count in (("text_encoder", 5_680_910_336), ("vae", 126_892_531)):
        sparse_weights(folder / part / "model.safetensors", count)
    return folder


def sparse_weights(file: Path, count: int) -> None:
    """Write a safetensors file with one FP32 tensor of `count` elements, all in a hole."""
    text = f'{{"w":{{"dtype":"F32","shape":[{count}],"data_offsets":[0,{4 * count}]}}}}'.encode()
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + 4 * count)


@pytest.fixture
def large(config: WorkerConfig, large_folder: Path) -> WorkerConfig:
    changes = {
        "path": large_folder,
        "sizes": ("832x480", "1280x720"),
        "default_size": "832x480",
        "max_frames": 81,
    }
    return config.model_copy(update={"model": config.model.model_copy(update=changes)})


def with_model(config: WorkerConfig, **changes: str) -> WorkerConfig:
    return config.model_copy(update={"model": config.model.model_copy(update=changes)})


def choose_placement(config: WorkerConfig, gib: float | None, device: Device) -> Placement:
    recipes = [None if mode.recipe is None else RECIPE for mode in config.modes]
    available = None if gib is None else int(gib * GIB)
    return place_model(config, recipes, device, available)


def test_the_sum_of_the_large_model(large, device):
    size = measure_model(large, [None, RECIPE], device)
    assert size.transformer / GIB == pytest.approx(38.1, abs=0.1)
    assert size.text_encoder / GIB == pytest.approx(10.6, abs=0.1)
    assert size.vae / GIB == pytest.approx(0.47, abs=0.01)
    # What an H100 took at 32,760 tokens was 3.5 GiB; the estimate is for 75,600, and not below.
    assert size.denoising / GIB * 32_760 / 75_600 == pytest.approx(3.5, abs=0.3)
    # What an H200 took at 1280x720.
    assert size.decoding / GIB == pytest.approx(19.5, abs=0.1)
    assert size.decoding_tiled < size.decoding / 4


def test_each_mode_by_itself(large, device):
    bf16 = large.model_copy(update={"modes": large.modes[:1]})
    w8a8 = large.model_copy(update={"modes": large.modes[1:]})
    assert measure_model(bf16, [None], device).transformer / GIB == pytest.approx(26.7, abs=0.1)
    assert measure_model(w8a8, [RECIPE], device).transformer / GIB == pytest.approx(15.2, abs=0.1)


def test_int8_keeps_more_in_bf16_and_needs_no_emulation(large):
    """On a card that multiplies no 8-bit floating point, where HiFloat8 is decoded and rounded."""
    card = Described()
    bf16 = large.model_copy(update={"modes": large.modes[:1]})
    quantized = large.model_copy(update={"modes": large.modes[1:]})
    int8 = measure_model(quantized, [QuantRecipe.load("boundary-int8")], card)
    hif8 = measure_model(quantized, [RECIPE], card)
    kept = 35 * 13824 * 5120  # ffn.net.2 has two bytes a weight
    assert int8.transformer - hif8.transformer == pytest.approx(kept, rel=0.01)
    assert int8.denoising == measure_model(bf16, [None], card).denoising < hif8.denoising
    assert (int8.decoded_extra, int8.decoded_at_once) == (0, 0)


def test_quantizing_beside_bf16_that_is_not_served_counts(large, device):
    quantized = large.modes[1]
    other = quantized.model_copy(update={"scales": Path("other")})
    two = large.model_copy(update={"modes": (quantized, other)})
    size = measure_model(two, [RECIPE, RECIPE], device)
    assert size.transformer_loading - size.transformer == pytest.approx(22.9 * GIB, rel=0.01)
    packed = [
        quantized.model_copy(update={"scales": None, "packed": Path(name)}) for name in ("a", "b")
    ]
    two = large.model_copy(update={"modes": tuple(packed)})
    size = measure_model(two, [RECIPE, RECIPE], device)
    assert size.transformer_loading == size.transformer


def test_modes_with_one_transformer_count_once(large, device):
    quantized = large.modes[1]
    again = quantized.model_copy(update={"name": "w8a8-cached"})
    size = measure_model(
        large.model_copy(update={"modes": (quantized, again)}), [RECIPE, RECIPE], device
    )
    assert size.transformer == size.transformer_loading
    assert size.transformer / GIB == pytest.approx(15.2, abs=0.1)


def test_a_mode_with_loras_beside_one_without_has_copies_of_what_they_change(large, device):
    bf16, w8a8 = large.modes
    base = shared_meta_model(LARGE)
    linears = {
        f"{name}.weight"
        for name, module in base.blocks.named_modules(prefix="blocks")
        if isinstance(module, torch.nn.Linear)
    }
    own = sum(base.get_parameter(name).nbytes for name in linears) / GIB
    loras = LoraSet((), frozenset(linears))
    lora = (LoraConfig(path=Path("fast.safetensors")),)
    fast = bf16.model_copy(update={"name": "fast", "lora": lora})
    fast_w8a8 = w8a8.model_copy(update={"name": "fast-w8a8", "lora": lora})

    def measure(*modes: ModeConfig) -> ModelBytes:
        config = large.model_copy(update={"modes": modes})
        recipes = [None if mode.recipe is None else RECIPE for mode in modes]
        given = [loras if mode.lora else LoraSet() for mode in modes]
        return measure_model(config, recipes, device, loras=given)

    alone, beside = measure(fast), measure(bf16, fast)
    assert alone.transformer == alone.transformer_loading == measure(bf16).transformer
    assert own == pytest.approx(26.2, abs=0.1)
    assert beside.transformer / GIB == pytest.approx(26.7 + own, abs=0.1)
    assert beside.transformer_loading == beside.transformer
    # Quantized, the five protected blocks are copied; until then all that the LoRAs change.
    quantized = measure(bf16, fast_w8a8)
    both = measure(bf16, w8a8)
    assert (quantized.transformer - both.transformer) / GIB == pytest.approx(own * 5 / 40, abs=0.1)
    extra = (quantized.transformer_loading - quantized.transformer) / GIB
    assert extra == pytest.approx(own * 35 / 40, abs=0.1)
    packed = {"scales": None, "packed": Path("packed")}
    loaded = measure(bf16, fast_w8a8.model_copy(update=packed))
    assert loaded.transformer_loading == loaded.transformer == quantized.transformer


def test_what_emulation_and_step_caches_take_is_added(large, device):
    def denoising(**changes: object) -> float:
        modes = (large.modes[0], large.modes[1].model_copy(update=changes))
        size = measure_model(large.model_copy(update={"modes": modes}), [None, RECIPE], device)
        return size.denoising / GIB

    width = 75_600 * 5120 * 2 / GIB
    assert denoising(exact_emulation=True) - denoising() == pytest.approx(4 * width)
    cache = FirstBlockCache(method="first_block", threshold=0.1)
    assert denoising(step_cache=cache) - denoising() == pytest.approx(6 * width)


@pytest.mark.parametrize(("capability", "widths"), [((8, 0), (14, 16)), ((9, 0), (12, 12))])
def test_a_device_without_fp8_counts_as_emulating(large, monkeypatch, capability, widths):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    cuda, modes = Device("cuda", "a device"), large.modes
    bf16 = large.model_copy(update={"modes": modes[:1]})
    prompts = 2 * 2 * large.model.text_tokens * 40 * 5120 * 2
    for config, recipes, each in ((bf16, [None], widths[0]), (large, [None, RECIPE], widths[1])):
        denoising = measure_model(config, recipes, cuda).denoising
        assert denoising == each * 75_600 * 5120 * 2 + prompts


CHOICES = {
    80.0: ("device", False),  # everything fits
    62.0: ("encode", False),  # the text encoder only while it encodes
    52.0: ("encode", True),
}


@pytest.mark.parametrize("gib", CHOICES)
def test_the_placement_follows_from_the_sum(large, device, gib):
    placement = choose_placement(large, gib, device)
    assert (placement.text_encoder, placement.vae_tiling) == CHOICES[gib]
    assert placement.need.total <= gib * GIB
    cuda = Device("cuda", "a device")
    on_device = placement.text_encoder == "device"
    assert placement.text_encoder_load_device(cuda).type == ("cuda" if on_device else "cpu")
    assert choose_placement(large, placement.need.total / GIB, device).need == placement.need


def test_a_configured_placement_is_kept(large, device):
    chosen = with_model(large, text_encoder="host", vae_tiling="on")
    placement = choose_placement(chosen, 80.0, device)
    assert (placement.text_encoder, placement.vae_tiling) == ("host", True)
    assert str(placement).startswith("text encoder: host, VAE decodes in tiles, at most 49.3 GiB")
    assert "text encoder" not in {*placement.need.resident, *placement.need.transient}


def test_without_a_limit_everything_is_on_the_device(large, device):
    placement = choose_placement(large, None, device)
    assert (placement.text_encoder, placement.vae_tiling) == ("device", False)


def test_what_does_not_fit_is_refused_with_sum_and_remedies(large, device):
    fixed = with_model(large, text_encoder="device", vae_tiling="off")
    with pytest.raises(TooLittleMemory) as caught:
        choose_placement(fixed, 40.0, device)
    message = str(caught.value)
    for part in (
        r"wan-mini with bf16, w8a8 at up to 1280x720 and 81 frames",
        r"needs 70\.\d GiB \(transformer 38\.1, VAE 0\.5, reserve 2\.0, text encoder 10\.6",
        r"largest of: denoising 8\.7, decoding 19\.5\)",
        r"device, which has 40\.0 GiB",
        "serve fewer modes",
        "python -m quant convert",
        'text_encoder = "host"',
        'vae_tiling = "on"',
        "smaller sizes",
    ):
        assert re.search(part, message), (part, message)
    with pytest.raises(TooLittleMemory) as caught:
        choose_placement(large, 40.0, device)
    assert "text_encoder =" not in str(caught.value), "it was tried on the host already"


def test_a_follower_needs_memory_to_denoise_only(large, device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    recipes = [None, RECIPE]
    least = measure_model(large, recipes, device).follower_need().total
    assert least / GIB == pytest.approx(38.1 + 2.0 + 8.7, abs=0.1)
    cuda = Device("cuda", "2 x a device", index=1)
    for enough in (None, least):
        check_follower(large, recipes, cuda, enough)
    with pytest.raises(TooLittleMemory) as caught:
        check_follower(
            with_model(large, text_encoder="device", vae_tiling="off"), recipes, cuda, least - 1
        )
    message = str(caught.value)
    for part in (
        r"needs 48\.\d GiB \(transformer 38\.1, reserve 2\.0, and the largest of: denoising 8\.7\)",
        r"on device 1, which denoises with the first, which has 48\.\d GiB",
        "serve fewer modes",
        "fewer frames",
    ):
        assert re.search(part, message), (part, message)
    assert "text_encoder" not in message
    assert "vae_tiling" not in message


class FullDevice(Device):
    """A device whose memory another process uses."""

    def available_bytes(self) -> int:
        return 1 << 20


class FakeLeader:
    """The part of `RankGroup` that a follower uses while it loads."""

    device = FullDevice("cpu", "a full device", index=1)

    def __init__(self, fingerprint: str) -> None:
        self._fingerprint = fingerprint

    def receive(self) -> str:
        return self._fingerprint

    def all_gather(self, value: object) -> list[object]:
        return [value, value]


def test_a_follower_without_memory_loads_nothing(
    config: WorkerConfig, engine: WanEngine, monkeypatch
):
    monkeypatch.setattr(follower, "load_modes", lambda *_: pytest.fail("it loads"))
    with pytest.raises(TooLittleMemory, match=r"on device 1, .* which has 0\.0 GiB"):
        load_follower(config, FakeLeader(engine.model.fingerprint))  # type: ignore[arg-type]


def test_the_estimate_of_weights_is_what_the_miniature_takes(
    config: WorkerConfig, engine: WanEngine, device: Device
):
    size = measure_model(config, [None, RECIPE], device)
    components = engine.components
    assert size.text_encoder == sum(p.nbytes for p in components.text_encoder.parameters())
    assert size.vae == sum(p.nbytes for p in components.vae.parameters())
    modes = [mode.weight_bytes for mode in engine.loaded.values()]
    assert max(modes) <= size.transformer <= sum(modes)


def test_settings_come_from_the_file(config: WorkerConfig):
    assert (config.model.text_encoder, config.model.vae_tiling) == ("auto", "auto")
    assert "text_encoder" not in config.model.offer("sha256:00").model_dump()
    with pytest.raises(ValueError, match="'device', 'host' or 'encode'"):
        ModelConfig.model_validate(config.model.model_dump() | {"text_encoder": "disk"})
    both = {"name": "m", "description": "d", "recipe": "r", "scales": "s", "packed": "p"}
    with pytest.raises(ValueError, match="both scales and a packed checkpoint"):
        ModeConfig.model_validate(both)


def test_the_reserve_is_part_of_every_sum():
    size = ModelBytes(1, 1, 1, 1, 1, 1, 1)
    assert size.need("host", False).total == 3 + RESERVE_BYTES


def test_the_choice_of_sparse_attention_counts_in_its_mode_only(large, device):
    dense, sparse = (
        measure_model(large, [None, recipe], device).denoising
        for recipe in (RECIPE, QuantRecipe.load("boundary-hif8-sparse"))
    )
    # 75,600 tokens in 591 blocks of 128; 40 heads of 35 blocks, for two prompts.
    assert sparse - dense == 2 * 35 * 40 * 591**2
