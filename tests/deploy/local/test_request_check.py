"""Test that a request, or a configuration, is refused before anything is started."""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from deploy.local import cli
from deploy.local.client import VideoRequest
from deploy.local.errors import LocalError, Refused
from deploy.local.ports import find_free_port
from deploy.local.request_check import check_config, check_request
from deploy.local.stack import WORKER_CONFIG

WHOLE = VideoRequest("a circle", "bf16", 2**32 - 1, 50, "96x96", 17, 20.0, "blurry")

W8A8 = """
[[modes]]
name = "w8a8"
description = "In 8 bits."
recipe = "boundary-hif8"
"""
MODELS = WORKER_CONFIG.parents[1] / "models"
SCALES = f'scales = "{MODELS}/wan-mini/scales/boundary-hif8.safetensors"\n'
LORA = """
[[modes]]
name = "w8a8"
description = "Of a style."
lora = [{ path = "style.safetensors" }]
"""


def configured(folder: Path, mode: str) -> Path:
    """Write a configuration of the miniature whose last mode is `mode`."""
    model, found, _ = WORKER_CONFIG.read_text(encoding="utf-8").partition(
        '[[modes]]\nname = "w8a8"'
    )
    assert found
    model = model.replace('"../models', f'"{MODELS}')
    file = folder / "worker.toml"
    file.write_text(model + mode, encoding="utf-8")
    return file


@pytest.mark.parametrize("request_", [VideoRequest("a circle"), WHOLE], ids=["least", "whole"])
def test_what_the_configuration_offers_passes(request_: VideoRequest) -> None:
    check_request(request_, WORKER_CONFIG)


def test_everything_wrong_is_named_with_what_there_is() -> None:
    wrong = VideoRequest("a circle", "turbo", -1, 51, "64x64", 16, 0.5, "a\x00b")
    with pytest.raises(Refused) as caught:
        check_request(wrong, WORKER_CONFIG)
    text = str(caught.value)
    for each in (
        "mode turbo is not known; use one of bf16, fast, fast-w8a8, w8a8.",
        "size 64x64 is not offered; use one of 96x96.",
        "num_frames is 16, which is not 4k+1 from 1 to 17.",
        "num_inference_steps is 51, which is not 1 to 50.",
        "guidance_scale is 0.5, which is not a number from 1 to 20",
        "seed is -1, which is not a whole number from 0 to",
        "negative_prompt holds the character U+0000",
    ):
        assert f"\n  - {each}" in text


def test_it_is_checked_against_the_configuration_that_is_served(tmp_path: Path) -> None:
    other = configured(tmp_path, W8A8 + SCALES)
    text = other.read_text(encoding="utf-8").replace('"96x96"', '"64x64"')
    other.write_text(text, encoding="utf-8")
    check_request(VideoRequest("a circle", size="64x64"), other)
    with pytest.raises(Refused, match="size 96x96 is not offered; use one of 64x64"):
        check_request(VideoRequest("a circle", size="96x96"), other)


def test_a_configuration_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(LocalError, match=r"There is no configuration file .*none\.toml"):
        check_request(WHOLE, tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        (
            W8A8 + 'packed = "packed"',
            r"/packed does not exist; make it with: \S+ -m quant convert",
        ),
        (W8A8 + 'scales = "s"', r"/s; make one with: \S+ -m quant calibrate .*--out \S+/s "),
        (LORA, r"style\.safetensors"),
        (W8A8.replace("boundary", "none") + SCALES, "no recipe 'none-hif8'"),
        (W8A8.replace("boundary-hif8", "own.toml") + SCALES, r"/own\.toml"),
    ],
    ids=["packed", "scales", "lora", "recipe", "recipe's file"],
)
def test_a_mode_whose_file_is_missing_is_named_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, words: str
) -> None:
    config = configured(tmp_path, mode)
    monkeypatch.setattr(cli, "running_stack", None)
    monkeypatch.setattr(cli, "throwaway_stack", None)
    for command in (["generate", "--prompt", "a circle", "--out", f"{tmp_path}/a.mp4"], ["demo"]):
        if command == ["demo"]:
            command += ["--port", str(find_free_port())]
        result = CliRunner().invoke(cli.app, [*command, "--config", str(config)])
        assert result.exit_code == 1, result.output
        said = " ".join(result.output.split())
        assert f"error: mode w8a8 of {config} cannot be served: " in said
        assert re.search(words, said), said


def test_a_model_folder_that_is_missing_is_named(tmp_path: Path) -> None:
    text = WORKER_CONFIG.read_text(encoding="utf-8").replace("../models/wan-mini", "none")
    (tmp_path / "worker.toml").write_text(text, encoding="utf-8")
    with pytest.raises(LocalError, match=r"there is no model folder .*/none, which .*worker\.toml"):
        check_config(tmp_path / "worker.toml")
