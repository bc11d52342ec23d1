"""Test previews of the real miniature: that they resemble the video, and when there are none."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch

import quant
from quant.calibration.preview_map import shrunk
from tests.support.job_controls import IgnoringControl, RecordingControl
from tests.support.requests import OWNER, generation_request
from tests.worker.conftest import EditedModel
from worker.config import PreviewConfig, WorkerConfig
from worker.device import Device
from worker.engine.wan_engine import WanEngine
from worker.errors import ConfigError
from worker.job.webp_animation import WebpEncoder
from worker.model_loader.latent_preview import load_latent_preview

MAP = Path("scales") / "preview-map.json"


def correlation(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.corrcoef(first.reshape(-1), second.reshape(-1))[0, 1])


def test_previews_come_to_resemble_the_video(engine: WanEngine) -> None:
    control = RecordingControl()
    clip = engine.generate(generation_request(), control, OWNER)
    video = torch.from_numpy(np.stack(list(clip.frames))).permute(3, 0, 1, 2)[None].float()
    goal = shrunk(video, torch.Size((1, 16, 5, 12, 12)), 2).permute(0, 2, 3, 1).numpy()
    assert sorted(control.previews) == [1, 2, 3, 4]
    found = []
    for preview in control.previews.values():
        assert preview.frames.shape == goal.shape == (5, 24, 24, 3)
        assert preview.frames.dtype == np.uint8
        assert preview.frames.flags.c_contiguous
        assert preview.fps == engine.model.fps / 4
        found.append(correlation(preview.frames.astype(float), goal))
    # A small shape on a flat ground, whose brightness a linear map misses: the map alone has 0.5.
    assert found[-1] > 0.4
    # What is predicted, and not the noisy latents: half way the picture can be recognised.
    assert found[1] > 0.2
    last = WebpEncoder().encode(control.previews[4])
    assert last is not None
    assert len(last) < 5000


def test_previews_change_no_frame(engine: WanEngine) -> None:
    short = {"num_frames": 5, "num_inference_steps": 2}
    with_previews, without = (
        np.stack(list(engine.generate(generation_request(**short), control, OWNER).frames))
        for control in (RecordingControl(), IgnoringControl())
    )
    assert np.array_equal(with_previews, without)


def test_the_pace_is_that_of_the_configuration(
    config: WorkerConfig, device: Device, engine: WanEngine
) -> None:
    assert engine.preview_pace is not None
    assert (engine.preview_pace.every_steps, engine.preview_pace.every_s) == (1, 2.0)
    slow = config.model_copy(update={"preview": PreviewConfig(every_steps=5, every_s=9)})
    preview = load_latent_preview(slow, device, engine.components.vae)
    assert preview is not None
    assert (preview.pace.every_steps, preview.pace.every_s) == (5, 9.0)


def test_previews_can_be_switched_off(
    config: WorkerConfig, device: Device, engine: WanEngine, caplog: pytest.LogCaptureFixture
) -> None:
    off = config.model_copy(update={"preview": PreviewConfig(enabled=False)})
    with caplog.at_level(logging.INFO):
        assert load_latent_preview(off, device, engine.components.vae) is None
    assert "previews are off" in caplog.text


def test_a_model_without_a_map_has_no_previews_and_says_so_once(
    edited: EditedModel, device: Device, engine: WanEngine, caplog: pytest.LogCaptureFixture
) -> None:
    (edited.folder / MAP).unlink()
    assert load_latent_preview(edited.config, device, engine.components.vae) is None
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert f"python -m quant preview-map --model {edited.folder}" in record.getMessage()


def test_a_configured_map_that_is_missing_is_refused(
    config: WorkerConfig, device: Device, engine: WanEngine, tmp_path: Path
) -> None:
    update = {"preview": PreviewConfig(map=tmp_path / "none.json")}
    with pytest.raises(ConfigError, match=r"There is no preview map .*none.json; make one with"):
        load_latent_preview(config.model_copy(update=update), device, engine.components.vae)


def test_a_map_of_another_vae_is_refused(
    edited: EditedModel, device: Device, engine: WanEngine
) -> None:
    edited.set("vae/config.json", latents_mean=[0.0] * 16)
    with pytest.raises(quant.PreviewMapError, match="was fitted to the VAE vae-sha256-full-v1:"):
        load_latent_preview(edited.config, device, engine.components.vae)
