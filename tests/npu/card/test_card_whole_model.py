"""Run a step of the whole 14B in shapes only: torch_npu knows every operator, and every shape fits.

Tensors are fake: they have a shape, a type and the card's device, and no memory. Operators then
compute what torch's and torch_npu's own functions for shapes say.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from benchmarks.fixtures.fabricate import SHAPES
from jobs.geometry import latent_frames, parse_size
from quant import QuantRecipe
from quant.kernels.eager import EagerKernels
from quant.kernels.self_test import BlockShape
from quant.numerics import hif8_int16
from quant.transformer.fuse import fuse_quantized
from quant.transformer.meta_model import empty_transformer, quantized_meta_model
from worker.device import Device

pytestmark = pytest.mark.npu

CONFIG = SHAPES["14b"].transformer | {
    "num_layers": 40,
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": (1, 2, 2),
}
RECIPES = {"bf16": None, "w8a8": "boundary-hif8", "int8": "boundary-int8"}
TEXT_TOKENS, FRAMES = 512, 81
SIZES = {"832x480": 32_760, "1280x720": 75_600}
"""The sizes that are served, and the tokens of a video of 81 frames."""


class Shapes(FakeTensorMode):
    """Counts operators, and answers what Python reads from fake tensors, which have no values.

    Scales are 1; the last of several values that are read together is a flag that nothing is wrong.
    """

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)  # tables that kernels have on the host
        self.ops: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            together = args[0].untyped_storage().nbytes() // args[0].element_size()
            return 0.0 if together > 1 and args[0].storage_offset() == together - 1 else 1.0
        if not func.is_view and not func._schema.name.startswith("prim::"):
            self.ops[func._schema.name] += 1
        return super().__torch_dispatch__(func, types, args, kwargs)


def make_fake(transformer: WanTransformer3DModel, device: torch.device) -> WanTransformer3DModel:
    """Give every tensor of a tree a fake one on the device, shared where it is shared."""
    made: dict[int, Tensor] = {}
    for each in transformer.modules():
        for registry in (each._parameters, each._buffers):
            for name, tensor in registry.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    new = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                    is_weight = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = nn.Parameter(new, requires_grad=False) if is_weight else new
                registry[name] = made[id(tensor)]
    return transformer


# Fake tensors have no address; linears that are no neighbours are joined by a copy.
@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("mode", list(RECIPES))
def test_a_step_of_the_whole_14b(npu: Device, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Whole tensors at a time: in pieces the same operators would run a hundred thousand times.
    monkeypatch.setattr(hif8_int16, "CHUNK", 1 << 40)
    transformer = empty_transformer(CONFIG)
    name = RECIPES[mode]
    recipe = None if name is None else QuantRecipe.load(name)
    if recipe is not None:
        transformer = quantized_meta_model(transformer, recipe)
    choice = npu.pick_kernels(
        quantized=mode == "w8a8", int8=mode == "int8", shape=BlockShape.of(transformer.config)
    )
    assert choice is not None
    assert choice.kernels.name != EagerKernels.name, choice.warning
    device = npu.torch_device
    # The simulated card has no part in it: nothing is computed.
    with _disable_current_modes(), Shapes() as shapes, torch.no_grad():
        make_fake(transformer, device)
        assert fuse_quantized(transformer, choice.kernels, {}) == ()
        for size, tokens in SIZES.items():
            width, height = parse_size(size)
            latent = (1, 16, latent_frames(FRAMES), height // 8, width // 8)
            latents = torch.empty(latent, dtype=torch.bfloat16, device=device)
            assert latents.numel() == 16 * 4 * tokens
            prompt = torch.empty(1, TEXT_TOKENS, 4096, dtype=torch.bfloat16, device=device)
            timestep = torch.empty(1, device=device)
            shapes.ops.clear()
            (predicted,) = transformer(latents, timestep, prompt, return_dict=False)
            assert predicted.shape == latents.shape
            assert predicted.device.type == "npu"
            assert shapes.ops["npu::npu_fusion_attention"] == 80, shapes.ops
            assert (shapes.ops["npu::npu_quant_matmul"] > 0) == (mode == "int8")
            print(
                f"\n14B {mode} {size} on {choice.kernels.name} kernels: "
                f"{sum(shapes.ops.values()):,} operators of {len(shapes.ops)} kinds in a step"
            )
