"""Test that a request is refused before anything is started, as the service would refuse it."""

from pathlib import Path

import pytest

from deploy.local.client import VideoRequest
from deploy.local.errors import LocalError, Refused
from deploy.local.request_check import check_request
from deploy.local.stack import WORKER_CONFIG

WHOLE = VideoRequest("a circle", "bf16", 2**32 - 1, 50, "96x96", 17, 20.0, "blurry")


@pytest.mark.parametrize("request_", [VideoRequest("a circle"), WHOLE], ids=["least", "whole"])
def test_what_the_configuration_offers_passes(request_: VideoRequest) -> None:
    check_request(request_, WORKER_CONFIG)


def test_everything_wrong_is_named_with_what_there_is() -> None:
    wrong = VideoRequest("a circle", "fast", -1, 51, "64x64", 16, 0.5, "a\x00b")
    with pytest.raises(Refused) as caught:
        check_request(wrong, WORKER_CONFIG)
    text = str(caught.value)
    for each in (
        "mode fast is not known; use one of bf16, w8a8.",
        "size 64x64 is not offered; use one of 96x96.",
        "num_frames is 16, which is not 4k+1 from 1 to 17.",
        "num_inference_steps is 51, which is not 1 to 50.",
        "guidance_scale is 0.5, which is not a number from 1 to 20",
        "seed is -1, which is not a whole number from 0 to",
        "negative_prompt holds the character U+0000",
    ):
        assert f"\n  - {each}" in text


def test_it_is_checked_against_the_configuration_that_is_served(tmp_path: Path) -> None:
    other = tmp_path / "other.toml"
    text = WORKER_CONFIG.read_text(encoding="utf-8").replace('"96x96"', '"64x64"')
    other.write_text(text, encoding="utf-8")
    check_request(VideoRequest("a circle", size="64x64"), other)
    with pytest.raises(Refused, match="size 96x96 is not offered; use one of 64x64"):
        check_request(VideoRequest("a circle", size="96x96"), other)


def test_a_configuration_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(LocalError, match=r"There is no configuration file .*none\.toml"):
        check_request(WHOLE, tmp_path / "none.toml")
