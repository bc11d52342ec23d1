"""Run whole miniature jobs on a card, from the queue to the stored MP4, beside those of the CPU."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from jobs.record import JobRecord, Video
from jobs.state import JobState
from tests.npu.card.conftest import Worker
from tests.npu.stand_in import simulated
from tests.support.job_controls import RecordingControl
from tests.support.launcher import decode_video
from tests.support.requests import OWNER, generation_request
from worker.engine.wan_engine import WanEngine

pytestmark = pytest.mark.npu

MODES: dict[str, dict[str, object]] = {
    "bf16": {},
    "w8a8": {},
    "fast-w8a8": {"num_inference_steps": 4, "guidance_scale": 1.0},
}
"""Modes of the shipped configuration, and what a job has to have in them."""
LEAST_DB = 40.0
"""Between the CPU's frames and those of a card whose operations round differently."""


def psnr_db(one: np.ndarray, other: np.ndarray) -> float:
    error = np.square(one.astype(float) - other.astype(float)).mean()
    return float(10 * np.log10(255**2 / error)) if error else float("inf")


def video_of(record: JobRecord) -> Video:
    assert record.state is JobState.SUCCEEDED, record
    assert record.video is not None
    return record.video


@pytest.mark.parametrize("mode", MODES)
def test_a_job_on_the_card_is_the_cpus_video(
    on_card: Worker, on_cpu: Worker, artifacts: Path, mode: str
) -> None:
    """The simulated card's operations are exact: there it is the same to the last bit."""
    assert on_card.engine.device.torch_device.type == "npu"
    kernels = {each.name: each.kernels for each in on_card.engine.modes}
    assert str(kernels[mode]).startswith("ascend"), kernels
    job = {"mode": mode} | MODES[mode]
    found, expected = video_of(on_card.run(**job)), video_of(on_cpu.run(**job))
    if simulated.active is not None:
        assert found.frames_sha256 == expected.frames_sha256
    one, other = (decode_video(artifacts / each.key) for each in (found, expected))
    assert psnr_db(one, other) >= LEAST_DB


def frames(engine: WanEngine, mode: str) -> np.ndarray:
    request = generation_request(mode=mode, num_frames=5, num_inference_steps=1, guidance_scale=1.0)
    return np.stack(list(engine.generate(request, RecordingControl(), OWNER).frames))


def test_with_the_text_encoder_on_the_card_the_videos_differ_by_rounding_only(
    on_card: Worker, on_cpu: Worker
) -> None:
    engine = on_card.engine
    components = replace(engine.components, text_encoder_placement="encode")
    modes = tuple(engine.loaded.values())
    encoding = WanEngine(engine.config, engine.model.fingerprint, engine.device, components, modes)
    for mode in ("bf16", "w8a8"):  # one step each
        difference = psnr_db(frames(encoding, mode), frames(on_cpu.engine, mode))
        print(f"\n{mode}, text encoder on the card: {difference:.1f} dB from the CPU's frames")
        assert difference >= LEAST_DB
