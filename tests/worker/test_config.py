"""Test that shipped configurations are valid, and that every fault is named with its position."""

import re
from pathlib import Path

import pytest

from worker.config import load_config
from worker.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = {"wan-mini": ["fast", "fast-w8a8"], "wan-14b": []}


def shipped_text() -> str:
    """The miniature's configuration without its modes of few steps."""
    text = (ROOT / "deploy" / "wan-mini.toml").read_text(encoding="utf-8")
    return text.partition('[[modes]]\nname = "fast"')[0]


@pytest.mark.parametrize(("name", "further"), SHIPPED.items())
def test_shipped_configurations_offer_both_modes(name: str, further: list[str]) -> None:
    config = load_config(ROOT / "deploy" / f"{name}.toml")
    assert [mode.name for mode in config.modes] == ["bf16", "w8a8", *further]
    assert config.modes[0].recipe is None
    assert config.modes[1].recipe == "boundary-hif8"
    assert all(path.is_absolute() for path in (config.model.path, config.modes[1].scales) if path)


def test_the_miniature_is_offered_as_it_was_trained() -> None:
    model = load_config(ROOT / "deploy" / "wan-mini.toml").model
    assert model.path == ROOT / "models" / "wan-mini"
    assert (model.sizes, model.max_frames, model.fps) == (("96x96",), 17, 8)
    assert model.text_tokens == 64


def test_the_miniature_is_offered_in_few_steps_as_it_was_distilled() -> None:
    config = load_config(ROOT / "deploy" / "wan-mini.toml")
    for mode in config.modes[2:]:
        terms = config.model.offer("").terms(mode)
        assert (terms.min_steps, terms.default_steps, terms.max_guidance_scale) == (4, 4, 1.0)
        assert mode.variant == "scheduler:euler", "the shift is the model's own"
        (lora,) = mode.lora
        assert (lora.path.is_dir(), lora.scale) == (True, 1.0)
        assert mode.scales is None or mode.scales.is_file()


def test_the_offer_holds_the_bounds_and_not_the_paths() -> None:
    offer = load_config(ROOT / "deploy" / "wan-14b.toml").model.offer("a fingerprint")
    assert offer.fingerprint == "a fingerprint"
    assert offer.default_size == "832x480"
    assert "path" not in offer.model_dump()


def test_relative_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    text = shipped_text().replace('recipe = "boundary-hif8"', 'recipe = "own.toml"')
    (tmp_path / "worker.toml").write_text(text, encoding="utf-8")
    config = load_config(tmp_path / "worker.toml")
    assert config.model.path == tmp_path.parent / "models" / "wan-mini"
    assert config.modes[1].recipe == str(tmp_path / "own.toml")


def test_previews_are_on_and_can_be_set(tmp_path: Path) -> None:
    shipped = load_config(ROOT / "deploy" / "wan-mini.toml").preview
    assert (shipped.enabled, shipped.every_steps, shipped.every_s) == (True, 1, 2.0)
    path = tmp_path / "worker.toml"
    own = '[preview]\nenabled = false\nevery_steps = 5\nevery_s = 10\nmap = "own.json"\n'
    path.write_text(own + shipped_text(), encoding="utf-8")
    found = load_config(path).preview
    assert (found.enabled, found.every_steps, found.every_s) == (False, 5, 10.0)
    assert found.map == tmp_path / "own.json"
    path.write_text("[preview]\nevery_s = 0.1\n" + shipped_text(), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"preview.every_s: .*greater than or equal to 0.2"):
        load_config(path)


FAULTS = {
    'default_mode = "w8a8"': ('default_mode = "fp4"', "default_mode 'fp4' is not a mode"),
    'sizes = ["96x96"]': ('sizes = ["96x90"]', "96x90 is not made of multiples of 16"),
    'default_size = "96x96"': ('default_size = "64x64"', "default_size 64x64 is not among"),
    "max_frames = 17": ("max_frames = 18", "max_frames = 18 is not of the form 4k.1"),
    "default_frames = 17": ("default_frames = 21", "default_frames 21 is not in 1..17"),
    "default_steps = ": ("default_steps = 99 #", "default_steps 99 is not in 1..50"),
    "fps = 8": ("fps = 0", "model.fps: .*greater than or equal to 1"),
    "text_tokens = 64": ("", "model.text_tokens: Field required"),
    "[model]": ("[model]\ncolour = 1", "model.colour: Extra inputs are not permitted"),
    'name = "bf16"': ('name = "w8a8"', "modes have the same name"),
    'recipe = "boundary-hif8"': ("", "needs both recipe and scales, or neither"),
    "text_tokens = ": ('flow_shift = {"1x1" = 5}\ntext_tokens = ', "flow_shift names sizes .* 1x1"),
    "default_guidance_scale = ": ("default_guidance_scale = inf #", "guidance_scale: .*finite"),
    "max_prompt_chars = ": (
        'flow_shift = {"96x96" = 0.0}\nmax_prompt_chars = ',
        "model.flow_shift.96x96: .*greater than 0",
    ),
    "max_steps = ": (
        'flow_shift = {"96x96" = inf}\nmax_steps = ',
        "model.flow_shift.96x96: .*finite number",
    ),
    'path = "../models/wan-mini"': ("path = 3", "model.path: "),
    "[[modes]]": ("[[modes", "cannot be read: "),
}


FAST = """
[[modes]]
name = "fast"
description = "Distilled to few steps."
scheduler = "euler"
flow_shift = 5.0
default_steps = 4
min_steps = 4
max_steps = 8
default_guidance_scale = 1.0
max_guidance_scale = 1.0
"""
MODE_FAULTS = {
    "min_steps = 4": ("min_steps = 9", "mode 'fast': min_steps 9 is more than max_steps 8"),
    "default_steps = 4": (
        "",
        r"mode 'fast': default_steps 20 is not in 4\.\.8; what a mode does not",
    ),
    "max_steps = 8": ("max_steps = 3", "min_steps 4 is more than max_steps 3"),
    "default_guidance_scale = 1.0": ("", r"default_guidance_scale 4 is not in 1\.\.1"),
    "max_guidance_scale = 1.0": ("max_guidance_scale = 0.5", "max_guidance_scale: .*equal to 1"),
    'scheduler = "euler"': ('scheduler = "lcm"', "modes.2.scheduler: Input should be 'euler'"),
    "flow_shift = 5.0": ("flow_shift = 0", "modes.2.flow_shift.number: .*greater than 0"),
    "flow_shift = 5.0 ": ('flow_shift = {"8x8" = 5.0}', "mode 'fast': flow_shift names .* 8x8"),
}


FAST_LORA = "Wan21_T2V_14B_lightx2v_cfg_step_distill_lora_rank64.safetensors"


def test_the_14b_shows_modes_of_few_steps(tmp_path: Path) -> None:
    """Each is a comment, and both name the same LoRA, whose file a configuration does not need."""
    shipped = (ROOT / "deploy" / "wan-14b.toml").read_text(encoding="utf-8")
    shown = [block for block in shipped.split("# [[modes]]\n") if '"fast' in block]
    lines = [
        line.removeprefix("# ") for block in shown for line in ["[[modes]]", *block.split("\n")]
    ]
    wanted = [line for line in lines if re.match(r"\[\[|\w+ = ", line)]
    config = load_config(write_config(tmp_path, shipped + "\n".join(["", *wanted])))
    assert [mode.name for mode in config.modes[2:]] == ["fast", "fast-w8a8"]
    assert [mode.recipe for mode in config.modes[2:]] == [None, "boundary-hif8"]
    for mode in config.modes[2:]:
        terms = config.model.offer("").terms(mode)
        assert (terms.default_steps, terms.max_guidance_scale) == (4, 1.0)
        assert mode.variant == "scheduler:euler+flow_shift:5"
        assert [lora.path.name for lora in mode.lora] == [FAST_LORA]


def write_config(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "worker.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_mode_offers_its_own_terms(tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path, shipped_text() + FAST))
    bf16, _, fast = (mode.offer() for mode in config.modes)
    assert fast.own == {
        "min_steps": 4,
        "max_steps": 8,
        "default_steps": 4,
        "max_guidance_scale": 1.0,
        "default_guidance_scale": 1.0,
    }
    assert fast.variant == "scheduler:euler+flow_shift:5"
    assert (bf16.own, bf16.variant) == ({}, None)
    assert config.modes[2].transformer_key == config.modes[0].transformer_key
    by_size = FAST.replace("flow_shift = 5.0", 'flow_shift = {"96x96" = 3}')
    config = load_config(write_config(tmp_path, shipped_text() + by_size))
    assert config.modes[2].variant == "scheduler:euler+flow_shift:96x96=3"


@pytest.mark.parametrize("line", MODE_FAULTS)
def test_a_fault_of_a_mode_is_named_with_it(tmp_path: Path, line: str) -> None:
    fault, message = MODE_FAULTS[line]
    assert line.strip() in FAST
    path = write_config(tmp_path, shipped_text() + FAST.replace(line.strip(), fault))
    with pytest.raises(ConfigError, match=message):
        load_config(path)


@pytest.mark.parametrize("line", FAULTS)
def test_a_fault_is_named_with_the_file(tmp_path: Path, line: str) -> None:
    fault, message = FAULTS[line]
    assert line in shipped_text()
    path = tmp_path / "worker.toml"
    path.write_text(shipped_text().replace(line, fault, 1), encoding="utf-8")
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(path)
    assert str(path) in str(caught.value)
    assert not re.search(r"\n|Value error|pydantic", str(caught.value))


def test_every_fault_of_a_file_is_named_at_once(tmp_path: Path) -> None:
    path = tmp_path / "worker.toml"
    path.write_text('[model]\nname = "wan-mini"\nfps = "eight"\n', encoding="utf-8")
    with pytest.raises(ConfigError, match=r"model\.path.*model\.fps.*modes: Field required"):
        load_config(path)


def test_a_missing_file_says_how_to_name_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no configuration file .*none\.toml.*--config"):
        load_config(tmp_path / "none.toml")


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "worker.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "worker.toml")
