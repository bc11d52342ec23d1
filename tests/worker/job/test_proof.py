"""Test the tiny job at the start: it finds what would fail every job, and names part and remedy."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import diffusers
import imageio_ffmpeg
import numpy as np
import pytest
import torch

from tests.support.job_controls import IgnoringControl
from tests.support.requests import OWNER, generation_request
from worker import startup
from worker.device import Device
from worker.engine.fake_engine import FakeEngine
from worker.engine.wan_engine import WanEngine
from worker.errors import ModelUnusable, ProofFailed, RanksLost
from worker.interface import Engine, JobControl
from worker.job.proof import prove, prove_in

NAN, INF = torch.nan, torch.inf


def failure(engine: Engine, scratch: Path) -> str:
    """Return the sentence that the proof of `engine` ends with."""
    with pytest.raises(ProofFailed) as caught:
        prove_in(engine, scratch)
    message = str(caught.value)
    assert re.fullmatch(r"This worker cannot make videos, because .*\): .*\.", message), message
    return message


def test_a_sound_worker_is_proven_in_all_modes_and_keeps_nothing(
    engine: WanEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    tiny_job = WanEngine.tiny_job

    def recorded(self: WanEngine, mode: str, control: JobControl) -> object:
        seen.append(mode)
        return tiny_job(self, mode, control)

    def one_frame() -> list[np.ndarray]:
        request = generation_request(num_frames=1, num_inference_steps=1)
        return list(engine.generate(request, IgnoringControl(), OWNER).frames)

    before = one_frame()
    monkeypatch.setattr(WanEngine, "tiny_job", recorded)
    prove_in(engine, tmp_path)
    assert seen == ["bf16", "w8a8"]
    assert list(tmp_path.iterdir()) == []
    assert np.array_equal(before, one_frame())


def test_the_scratch_folder_is_like_that_of_jobs_and_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    prove(FakeEngine())
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "file" / "gone"))
    with pytest.raises(ProofFailed, match=r"no scratch folder .*gone.*: set TMPDIR to a folder"):
        prove(FakeEngine())


def test_the_fake_engine_is_proven_without_its_steps(tmp_path: Path) -> None:
    steps: list[int] = []
    prove_in(FakeEngine(steps.append), tmp_path)
    assert steps == []


# ---------------------------------------------------------------------- ffmpeg

FFMPEG: dict[str, tuple[bytes | None, str]] = {
    "is missing": (None, "ffmpeg does not start: No such file"),
    "is no program": (b"\0\0\0\0", "ffmpeg does not start: Exec format error"),
    "lacks the encoder": (
        b"#!/bin/sh\necho Unknown encoder >&2; exit 8",
        "ffmpeg .* 8: Unknown encoder",
    ),
    "is killed": (b"#!/bin/sh\ncat > /dev/null; kill -9 $$", "ffmpeg was killed by signal 9"),
    "writes nothing": (b"#!/bin/sh\ncat > /dev/null", "FileNotFoundError: .*proof.mp4"),
    "writes an empty file": (
        b'#!/bin/sh\nfor a; do :; done; case $a in *.mp4) cat > /dev/null; : > "$a";; esac',
        "RuntimeError: ",
    ),
}


@pytest.mark.parametrize("fault", FFMPEG)
def test_an_ffmpeg_that_makes_no_video_is_found(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, reason = FFMPEG[fault]
    path = tmp_path / "ffmpeg"
    if program is not None:
        path.write_bytes(program)
        path.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(path))
    message = failure(FakeEngine(), tmp_path)
    assert re.search(rf"encoding the MP4 failed in .* mode 'plain' \({reason}", message), message
    assert "install the package imageio-ffmpeg again, or set IMAGEIO_FFMPEG_EXE" in message


def test_a_machine_without_any_ffmpeg_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("IMAGEIO_FFMPEG_EXE", raising=False)
    monkeypatch.setattr("imageio_ffmpeg._utils._get_ffmpeg_exe", lambda: None)
    assert "There is no ffmpeg on this machine" in failure(FakeEngine(), tmp_path)


def test_a_video_that_lost_frames_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imageio_ffmpeg, "count_frames_and_secs", lambda _path: (0, 0.0))
    assert "The MP4 of 1 frames has 0 frames" in failure(FakeEngine(), tmp_path)


def test_a_scratch_folder_that_is_gone_is_found(tmp_path: Path) -> None:
    message = failure(FakeEngine(), tmp_path / "removed")
    assert re.search(r"encoding the MP4 failed .*removed.* TMPDIR names a folder", message)


# ---------------------------------------------------------------------- the model


@pytest.mark.parametrize("mode", ["bf16", "w8a8"])
@pytest.mark.parametrize("value", [NAN, INF])
def test_numbers_that_are_not_finite_name_the_mode(
    engine: WanEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, value: float
) -> None:
    # The modes share what is not quantized, so each gets a last linear of its own.
    transformer = engine.loaded[mode].transformer
    broken = torch.nn.Linear(128, 64, dtype=torch.bfloat16)
    torch.nn.init.constant_(broken.weight, value)
    monkeypatch.setitem(transformer._modules, "proj_out", broken)
    message = failure(engine, tmp_path)
    assert f"denoising failed in a tiny job in mode '{mode}' (Denoising in mode" in message
    assert "NaN or infinite" in message
    assert "see that transformer and scheduler are those of this model" in message


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_numbers_that_are_not_finite_name_the_vae(
    engine: WanEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    bias = engine.components.vae.decoder.conv_out.bias
    monkeypatch.setattr(bias, "data", torch.full_like(bias, value))
    message = failure(engine, tmp_path)
    assert re.search(r"because the VAE failed .*\(The VAE gave \d+ of \d+ values that are", message)
    assert "see that the folder vae is that of this model" in message


def test_numbers_that_are_not_finite_name_the_text_encoder(
    edited, device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edited.set_number("text_encoder", "encoder.final_layer_norm.weight", NAN)
    monkeypatch.setattr(startup, "check_finite", lambda *_: None)
    engine = startup.load_engine(edited.with_modes("bf16"), device)
    message = failure(engine, tmp_path)
    assert re.search(r"because the text encoder failed .*\(The text encoder gave \d+ of", message)
    assert "see that the folders tokenizer and text_encoder are those of this model" in message


def test_a_default_negative_prompt_that_is_too_long_is_found(
    edited, device: Device, tmp_path: Path
) -> None:
    """Every request without a negative prompt of its own would fail."""
    edited.config = edited.with_model(default_negative_prompt="red " * 64)
    engine = startup.load_engine(edited.with_modes("bf16"), device)
    message = failure(engine, tmp_path)
    assert re.search(r"negative_prompt has 65 tokens, .*default_negative_prompt fits", message)


def test_an_image_to_video_transformer_is_found(
    edited, device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the comparison of settings, and the kinds of models, which find it before."""
    edited.set("transformer/config.json", in_channels=36)
    edited.change(
        "transformer",
        "patch_embedding.weight",
        lambda weight: torch.cat([weight, weight.new_zeros(weight.shape[0], 20, 1, 2, 2)], dim=1),
    )
    monkeypatch.setattr(startup, "check_settings", lambda *_: None)
    monkeypatch.setattr("worker.model_loader.mode_plan.check_model_kind", lambda *_: None)
    engine = startup.load_engine(edited.with_modes("bf16"), device)
    message = failure(engine, tmp_path)
    assert re.search(r"denoising failed in .* mode 'bf16' \(RuntimeError: .*36.*16", message)


def test_a_scheduler_that_the_pipeline_cannot_drive_is_found(
    engine: WanEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the check of schedulers, which finds it before anything is loaded."""
    with_ddim = engine.components.__class__(
        engine.components.tokenizer,
        engine.components.text_encoder,
        engine.components.vae,
        diffusers.DDIMScheduler(),
    )
    monkeypatch.setattr(engine, "components", with_ddim)
    assert re.search(r"denoising failed .*\(AttributeError: .*DDIM", failure(engine, tmp_path))


@pytest.mark.parametrize("error", [RanksLost("gone"), MemoryError("full")])
def test_a_lost_device_is_not_the_model_s_fault(
    engine: WanEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(engine, "_denoise", fail)
    expected = RanksLost if isinstance(error, RanksLost) else ProofFailed
    with pytest.raises(expected):
        prove_in(engine, tmp_path)


def test_a_worker_that_fails_the_proof_has_no_engine_to_offer(edited, device: Device) -> None:
    """NaN in a part's weights is refused once they are loaded."""
    edited.set_number("vae", "decoder.conv_in.weight", NAN)
    with pytest.raises(ModelUnusable, match=r"VAE has .* 'decoder.conv_in.weight'"):
        startup.load_engine(edited.with_modes("bf16"), device)
