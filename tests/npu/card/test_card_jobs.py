"""Run whole miniature jobs on a card, from the queue to the stored MP4, beside those of the CPU."""

from pathlib import Path

import numpy as np
import pytest

from jobs.record import JobRecord
from jobs.state import JobState
from quant.kernels.eager import EagerKernels
from quant.kernels.selection import KernelChoice
from tests.npu.card.conftest import CONFIG, Worker
from tests.support.job_controls import RecordingControl
from tests.support.launcher import decode_video
from tests.support.requests import OWNER, generation_request
from worker.config import load_config
from worker.device import Device, pick_device
from worker.engine.wan_engine import WanEngine
from worker.model_loader.loader import load_model
from worker.model_loader.memory_plan import place_model
from worker.model_loader.mode_plan import fingerprint_model, plan_modes

pytestmark = pytest.mark.npu

MODES = tuple(mode.name for mode in load_config(CONFIG).modes)
LEAST_DB = 38.0
"""Between a card's operations, which round differently, and the CPU's; of decoded frames."""


def psnr_db(one: np.ndarray, other: np.ndarray) -> float:
    error = np.square(one.astype(float) - other.astype(float)).mean()
    return float(10 * np.log10(255**2 / error)) if error else float("inf")


def video(record: JobRecord, artifacts: Path) -> np.ndarray:
    assert record.state is JobState.SUCCEEDED, record
    assert record.video is not None
    return decode_video(artifacts / record.video.key)


@pytest.mark.parametrize("mode", MODES)
def test_a_job_on_the_card_is_nearly_the_cpus_video(
    on_card: Worker, on_cpu: Worker, artifacts: Path, mode: str
) -> None:
    assert on_card.engine.device.torch_device.type == "npu"
    found = video(on_card.run(mode=mode), artifacts)
    expected = video(on_cpu.run(mode=mode), artifacts)
    difference = psnr_db(found, expected)
    print(f"\n{mode}: {difference:.1f} dB between the card's video and the CPU's")
    assert difference >= LEAST_DB


def engine_in_plain_torch(device: Device) -> WanEngine:
    """Load the engine with `EagerKernels` in every mode, and the text encoder on the host."""
    text = CONFIG.read_text(encoding="utf-8")
    assert "text_encoder" not in text, "the shipped configuration says where it is"
    config = load_config(CONFIG)
    model = config.model.model_copy(update={"text_encoder": "host"})
    config = config.model_copy(update={"model": model})
    fingerprint = fingerprint_model(config)
    plans = plan_modes(config, fingerprint)
    placement = place_model(config, [plan.recipe for plan in plans], device, None)
    kernels = {plan.config.transformer_key: KernelChoice(EagerKernels()) for plan in plans}
    modes, components = load_model(config.model.path, plans, device, placement, dict(kernels))
    return WanEngine(config.model, fingerprint, device, components, modes)


def frames(engine: WanEngine, mode: str) -> np.ndarray:
    request = generation_request(mode=mode, num_frames=1, num_inference_steps=3, guidance_scale=1.0)
    return np.stack(list(engine.generate(request, RecordingControl(), OWNER).frames))


def test_in_plain_torch_it_is_the_cpus_video_to_the_last_bit(npu: Device) -> None:
    on_npu = engine_in_plain_torch(npu)
    on_host = engine_in_plain_torch(pick_device("cpu", threads=1))
    for mode in MODES:
        assert np.array_equal(frames(on_npu, mode), frames(on_host, mode)), mode
