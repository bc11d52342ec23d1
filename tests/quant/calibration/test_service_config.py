"""A worker's configuration, as calibration reads it."""

from pathlib import Path
from typing import Any

import pytest

from quant.calibration.sampler import SamplerSettings
from quant.calibration.sampler_options import sampler_of
from quant.calibration.service_config import KNOWN_KEYS, read_service_config
from quant.errors import CalibrationError
from worker.config import ModelConfig, load_config

DEPLOY = Path(__file__).parents[3] / "deploy"


def settings(model: Path, config: Path, size: str | None = None, **given: Any) -> SamplerSettings:
    return sampler_of(model, config, size=size, **given)


def test_the_keys_are_the_workers():
    assert ModelConfig.model_fields.keys() == KNOWN_KEYS


def test_what_a_service_uses_is_what_its_worker_reads(tiny_model):
    file = DEPLOY / "wan-14b.toml"
    model = load_config(file).model
    found = settings(tiny_model, file)
    assert found == SamplerSettings(
        size=(832, 480),
        num_frames=model.default_frames,
        num_inference_steps=model.default_steps,
        guidance_scale=model.default_guidance_scale,
        text_tokens=model.text_tokens,
        negative_prompt=model.default_negative_prompt,
        flow_shift=3.0,
    )
    assert found.negative_prompt.startswith("Bright tones")
    own = settings(tiny_model, DEPLOY / "wan-mini.toml")
    assert (own.size, own.negative_prompt, own.flow_shift) == ((96, 96), "", None)


def test_options_hold_instead_and_the_shift_is_that_of_the_size(tiny_model):
    file = DEPLOY / "wan-14b.toml"
    assert settings(tiny_model, file, "1280x720").flow_shift == 5.0
    found = settings(
        tiny_model, file, "720x1280", flow_shift=4.0, negative_prompt="", seed=9, num_frames=None
    )
    assert (found.flow_shift, found.negative_prompt, found.seed) == (4.0, "", 9)
    with pytest.raises(CalibrationError, match=r"size 96x96 is none that .*wan-14b.toml offers \("):
        settings(tiny_model, file, "96x96")


GOOD = (DEPLOY / "wan-mini.toml").read_text()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[model", "cannot read the worker's configuration"),
        ("[modes]", r"has no table \[model\]"),
        (GOOD.replace("text_tokens = 64", ""), r"\[model\] lacks text_tokens"),
        (GOOD.replace("text_tokens = 64", "text_tokens = '64'"), "must be of the type int, not"),
        (GOOD.replace("text_tokens", "text_token"), "unknown keys, which .*: text_token$"),
        (GOOD.replace('default_size = "96x96"', 'default_size = "big"'), "must be WIDTHxHEIGHT"),
        (f'{GOOD}\n[model.flow_shift]\n"96x96" = true', r"96x96 in \[model.flow_shift\] must be"),
        (f'{GOOD}\n[model.flow_shift]\n"96x96" = -1', "flow shift -1 must be a number above 0"),
    ],
)
def test_a_wrong_file_is_refused_with_the_key(tmp_path, tiny_model, text, message):
    (tmp_path / "worker.toml").write_text(text)
    with pytest.raises(CalibrationError, match=message):
        settings(tiny_model, tmp_path / "worker.toml")


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(CalibrationError, match=r"cannot read .*absent.toml: No such file"):
        read_service_config(tmp_path / "absent.toml")
