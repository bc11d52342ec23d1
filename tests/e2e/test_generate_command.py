"""Test the command that makes an MP4 of a prompt, through Valkey, worker and service."""

import shutil
from pathlib import Path

import pytest

from deploy.local.stack import ROOT
from mini.world.oracle import verdicts
from mini.world.scenes import parse_caption
from tests.support.launcher import decode_video, describe_video, run

PROMPT = "a small red circle moving right on a black background"


@pytest.mark.parametrize("mode", ["bf16", "w8a8", "fast-w8a8"])
def test_a_prompt_becomes_a_playable_mp4_that_shows_it(tmp_path: Path, mode: str) -> None:
    out = tmp_path / "out.mp4"
    code, output = run(
        *("generate", "--prompt", PROMPT, "--mode", mode),
        *("--seed", "7", "--out", str(out)),
    )
    assert code == 0, output
    stream, frames = describe_video(out)
    shown = verdicts(decode_video(out), parse_caption(PROMPT))
    assert shown == dict.fromkeys(shown, True)
    assert stream.startswith("h264")
    assert "yuv420p" in stream
    assert "96x96" in stream
    assert frames == 17
    last = output.splitlines()[-1]
    assert last.startswith(f"{out}: 17 frames of 96x96, mode {mode}, seed 7; seconds: queue ")
    assert list(tmp_path.iterdir()) == [out]


def test_a_refused_prompt_is_explained_and_writes_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out.mp4"
    code, output = run(
        *("generate", "--prompt", PROMPT, "--mode", "no-such-mode"),
        *("--steps", "100000", "--out", str(out)),
    )
    assert code == 1
    assert "error: " in output
    assert "mode no-such-mode is not known" in output
    assert "num_inference_steps is 100000, which is not 1 to " in output
    assert "Traceback" not in output
    assert not out.exists()


def test_an_output_folder_that_does_not_exist_is_found_out_at_once(tmp_path: Path) -> None:
    out = tmp_path / "missing" / "out.mp4"
    code, output = run("generate", "--prompt", PROMPT, "--out", str(out))
    assert code == 1
    assert output == f"error: the folder {out.parent} for out.mp4 does not exist\n"


def test_a_worker_that_fails_to_load_ends_it_with_one_clear_line(tmp_path: Path) -> None:
    good = (ROOT / "deploy" / "wan-mini.toml").read_text()
    broken = tmp_path / "broken.toml"
    model = tmp_path / "cut-model"
    shutil.copytree(ROOT / "models" / "wan-mini", model)
    (model / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"cut")
    broken.write_text(good.replace("../models/wan-mini", str(model)))
    assert broken.read_text() != good
    code, output = run("generate", "--prompt", PROMPT, "--config", str(broken))
    assert code == 1
    line = output.splitlines()[-1]
    assert line.startswith("error: the worker ended with exit code 1: ")
    assert "cut-model/vae" in line
    assert "Traceback" not in output
    log = ROOT / line.rpartition("(log: ")[2].rstrip(")")
    assert "cut-model/vae" in log.read_text()
