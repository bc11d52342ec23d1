"""What a load allocates on the card is what the memory plan says, within 5 %.

The 14B is loaded from files that are holes behind real headers, by the loader's own code, but
nothing is read into the tensors: a simulated card's memory is the host's, and is used when it is
written to.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from torch import nn
from transformers import UMT5Config, UMT5EncoderModel

import quant
from benchmarks.fixtures.fabricate import SHAPES
from quant.device import backend
from quant.kernels.ascend import RankLinear
from quant.kernels.joined_linear import GridProduct
from quant.transformer.meta_model import (
    load_weights,
    move_buffers,
    quantized_meta_model,
    shared_meta_model,
    shared_quantized_meta_model,
    without_weights,
)
from quant.transformer.module_tree import share_tree
from quant.weights.header import stored_tensors
from quant.weights.reader import ReadRequest, TensorReader
from quant.weights.writer import header_of, spec_of
from tests.npu.card.conftest import CONFIG
from tests.support.job_controls import RecordingControl
from tests.support.requests import OWNER, generation_request
from worker.config import WorkerConfig, load_config
from worker.device import Device
from worker.engine.wan_engine import WanEngine
from worker.model_loader.components import ComponentLoader
from worker.model_loader.memory_plan import measure_model
from worker.model_loader.model_shape import WAN_14B
from worker.model_loader.plan_table import published_cases
from worker.startup import load_engine

pytestmark = pytest.mark.npu

TOLERANCE = 0.05


def allocated(device: Device) -> int:
    gc.collect()
    return int(backend("npu").memory_allocated(device.index))


class AllocatingReader(TensorReader):
    """Allocates as a load does, and reads nothing."""

    def read(
        self,
        wanted: Iterable[ReadRequest],
        arrived: Callable[[list[torch.Tensor]], object] = id,
    ) -> None:
        for _ in wanted:
            pass


def write_holes(file: Path, module: nn.Module) -> None:
    """Write a safetensors file with a module's header, and a hole for its weights."""
    specs = [spec_of(name, each) for name, each in module.state_dict().items()]
    specs.sort(key=lambda spec: (-spec[1].itemsize, spec[0]))
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as stream:
        stream.write(header_of(specs, {"format": "pt"}))
        size = sum(torch.Size(shape).numel() * dtype.itemsize for _, dtype, shape in specs)
        stream.truncate(stream.tell() + size)


@pytest.fixture(scope="module")
def components(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the 14B's text encoder and VAE, without numbers."""
    folder = tmp_path_factory.mktemp("components")
    shape = SHAPES["14b"]
    with without_weights():
        encoder = UMT5EncoderModel(UMT5Config(**shape.text_encoder, dtype="bfloat16"))
        vae = AutoencoderKLWan(**shape.vae)
    encoder.config.architectures = ["UMT5EncoderModel"]
    encoder.config.save_pretrained(folder / "text_encoder")
    vae.save_config(folder / "vae")
    encoder.encoder.embed_tokens = nn.Identity()  # the same weights as `shared`, stored once
    write_holes(folder / "text_encoder" / "model.safetensors", encoder.bfloat16())
    write_holes(folder / "vae" / "diffusion_pytorch_model.safetensors", vae)
    return folder


def test_the_14b_takes_what_is_planned(npu: Device, components: Path, tmp_path: Path) -> None:
    case = next(each for each in published_cases() if each.modes == "`bf16` + `w8a8`")
    size = measure_model(case.config, case.recipes, npu, WAN_14B)
    before = allocated(npu)

    parts = ComponentLoader(components, npu)
    encoder_and_vae = allocated(npu) - before
    assert encoder_and_vae == pytest.approx(size.text_encoder + size.vae, rel=TOLERANCE)

    recipe = case.recipes[1]
    assert recipe is not None
    reader = AllocatingReader(npu.torch_device)
    plain = shared_meta_model(WAN_14B.transformer)
    write_holes(tmp_path / "bf16.safetensors", plain)
    bf16 = share_tree(plain, lambda _name, _module: None)
    load_weights(bf16, stored_tensors([tmp_path / "bf16.safetensors"]), reader)
    move_buffers(bf16, npu.torch_device)
    quantized = shared_quantized_meta_model(WAN_14B.transformer, recipe)
    write_holes(tmp_path / "w8a8.safetensors", quantized)
    packed = quantized_meta_model(bf16, recipe)
    load_weights(packed, stored_tensors([tmp_path / "w8a8.safetensors"]), reader)
    transformers = allocated(npu) - before - encoder_and_vae
    assert transformers == pytest.approx(size.transformer, rel=TOLERANCE)
    assert next(parts.vae.parameters()).device.type == bf16.device.type == "npu"


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> WorkerConfig:
    """The miniature with its quantized mode alone, from a packed checkpoint."""
    config = load_config(CONFIG)
    (mode,) = (each for each in config.modes if each.name == "w8a8")
    assert mode.recipe is not None
    assert mode.scales is not None
    out = tmp_path_factory.mktemp("packed") / "w8a8"
    quant.convert(config.model.path, quant.QuantRecipe.load(mode.recipe), mode.scales, out)
    alone = mode.model_copy(update={"scales": None, "packed": out})
    model = config.model.model_copy(update={"default_mode": "w8a8"})
    return config.model_copy(update={"modes": (alone,), "model": model})


def load(config: WorkerConfig, storage: str, npu: Device) -> tuple[WanEngine, int]:
    """Return an engine whose weights are held in a storage, and what loading it allocated."""
    model = config.model.model_copy(update={"weight_storage": storage, "text_encoder": "device"})
    before = allocated(npu)
    engine = load_engine(config.model_copy(update={"model": model}), npu)
    return engine, allocated(npu) - before


def frames(engine: WanEngine) -> np.ndarray:
    request = generation_request(
        mode="w8a8", num_frames=1, num_inference_steps=1, guidance_scale=2.0
    )
    return np.stack(list(engine.generate(request, RecordingControl(), OWNER).frames))


def test_the_packed_miniature_takes_what_is_planned_and_gives_the_same_frames(
    npu: Device, packed: WorkerConfig
) -> None:
    recipe = quant.QuantRecipe.load(str(packed.modes[0].recipe))
    size = measure_model(packed, [recipe], npu)
    planned = size.transformer + size.text_encoder + size.vae
    codes, taken = load(packed, "packed", npu)
    assert taken == pytest.approx(planned, rel=TOLERANCE)
    products = [m for m in codes.loaded["w8a8"].transformer.modules() if isinstance(m, RankLinear)]
    # All but the products of the prompt's keys and values decode one ahead, on a second stream.
    assert Counter(each.weight_ahead is None for each in products) == {False: 35 * 6, True: 35}
    grid, taken = load(packed, "bf16_grid", npu)
    assert taken == pytest.approx(planned + size.decoded_extra, rel=TOLERANCE)
    modules = grid.loaded["w8a8"].transformer.modules()
    assert sum(isinstance(each, GridProduct) for each in modules) == 35 * 7
    assert np.array_equal(frames(codes), frames(grid))
