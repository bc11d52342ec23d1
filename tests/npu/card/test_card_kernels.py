"""Which kernels a card gets is found out by trying; those of a 950 give nearly the CPU's video."""

from collections.abc import Iterator

import numpy as np
import pytest

from quant.kernels.ascend import AscendKernels
from quant.kernels.ascend_native import NativeHif8Kernels, converts_hifloat8
from quant.kernels.eager import EagerKernels
from quant.kernels.interface import Kernels
from quant.kernels.selection import KernelChoice
from quant.kernels.self_test import BlockShape
from tests.npu.card.conftest import CONFIG, Worker
from tests.npu.stand_in import simulated
from tests.support.job_controls import RecordingControl
from tests.support.requests import OWNER, generation_request
from worker.config import load_config
from worker.device import Device, pick_device
from worker.engine.wan_engine import WanEngine
from worker.model_loader.loader import load_model
from worker.model_loader.memory_plan import place_model
from worker.model_loader.mode_plan import fingerprint_model, plan_modes

pytestmark = pytest.mark.npu

MODES = ("bf16", "w8a8")
EXACT = pytest.mark.skipif(simulated.active is None, reason="a real card rounds otherwise")


def engine_on(device: Device, kernels: Kernels) -> WanEngine:
    """Load both modes on `kernels`, with the text encoder on the host."""
    config = load_config(CONFIG)
    model = config.model.model_copy(update={"text_encoder": "host"})
    modes = tuple(mode for mode in config.modes if mode.name in MODES)
    config = config.model_copy(update={"model": model, "modes": modes})
    fingerprint = fingerprint_model(config)
    plans = plan_modes(config, fingerprint)
    placement = place_model(config, [plan.recipe for plan in plans], device, None)
    chosen = {plan.config.transformer_key: KernelChoice(kernels) for plan in plans}
    loaded, components = load_model(config.model.path, plans, device, placement, chosen)
    return WanEngine(config.model, fingerprint, device, components, loaded)


def frames(engine: WanEngine, mode: str) -> np.ndarray:
    request = generation_request(mode=mode, num_frames=1, num_inference_steps=1, guidance_scale=1.0)
    return np.stack(list(engine.generate(request, RecordingControl(), OWNER).frames))


@pytest.fixture(scope="module")
def expected() -> dict[str, np.ndarray]:
    """The frames of both modes on the CPU."""
    engine = engine_on(pick_device("cpu", threads=1), EagerKernels())
    return {mode: frames(engine, mode) for mode in MODES}


@pytest.fixture
def multiplying_hifloat8(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the simulated card's operations be those of a 950."""
    monkeypatch.setenv("STAND_IN_SOC", "Ascend950PR_9599")
    converts_hifloat8.cache_clear()
    yield
    converts_hifloat8.cache_clear()


@EXACT
@pytest.mark.usefixtures("multiplying_hifloat8")
def test_products_of_codes_give_nearly_the_cpus_video(
    npu: Device, expected: dict[str, np.ndarray]
) -> None:
    choice = npu.pick_kernels(quantized=True, shape=BlockShape(2, 64, 128), per_row_scales=True)
    assert (choice.kernels.name, choice.warning) == (NativeHif8Kernels.name, None)
    assert npu.multiplies_codes
    found = frames(engine_on(npu, choice.kernels), "w8a8")
    error = np.square(found.astype(float) - expected["w8a8"].astype(float)).mean()
    assert 10 * np.log10(255**2 / error) > 38, "biases are added after a rounding of their own"


@pytest.mark.parametrize("quantized", [False, True])
def test_kernels_are_chosen_by_trial(npu: Device, *, quantized: bool) -> None:
    choice = npu.pick_kernels(quantized=quantized, shape=BlockShape(2, 64, 128))
    assert choice.kernels.name.startswith("ascend")
    needs_triton = quantized and choice.kernels.name == AscendKernels.name
    assert ("multiplies no HiFloat8" in (choice.warning or "")) == needs_triton


def test_a_started_worker_says_which_kernels_it_runs_on(on_card: Worker) -> None:
    kernels = {mode.name: mode.kernels for mode in on_card.engine.modes}
    assert all((kernels[name] or "").startswith("ascend") for name in MODES), kernels
