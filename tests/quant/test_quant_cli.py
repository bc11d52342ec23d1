"""The toolkit's commands, run in process through typer's runner."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import deque
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from deploy.local.waiting import wait_until
from quant import cli
from quant.calibration.preview_map import DEFAULT_NAME, MIN_VIDEOS, load_preview_map
from quant.calibration.sampler import SamplerSettings
from quant.calibration.scales import check_scales, load_scales, save_scales
from quant.cli import _fit_beside, app
from quant.numerics.code_table import codes_markdown
from quant.numerics.linear import Hif8Linear
from quant.recipe.recipe import QuantRecipe
from quant.transformer.quantize import quantize_transformer
from quant.weights.fingerprint import model_fingerprint
from tests.quant.weights.model_folders import copy_model, rename_weights

COLOURS = ("red", "blue", "green", "black", "white", "pink", "grey", "tan")
PROMPTS = "\n".join(f"a {colour} box" for colour in COLOURS)


@pytest.fixture
def arguments(tmp_path, tiny_model, recipe_dict) -> dict[str, str]:
    (tmp_path / "prompts.txt").write_text(PROMPTS)
    (tmp_path / "recipe.json").write_text(json.dumps(recipe_dict))
    return {
        "--model": str(tiny_model),
        "--prompts": str(tmp_path / "prompts.txt"),
        "--out": str(tmp_path / "scales.safetensors"),
        "--recipe": str(tmp_path / "recipe.json"),
        "--steps": "4",
        "--size": "32x32",
        "--frames": "5",
        "--text-tokens": "16",
    }


def run(*command: str):
    return CliRunner().invoke(app, command)


def calibrate(arguments: dict[str, str]):
    return run("calibrate", *(word for pair in arguments.items() for word in pair))


@pytest.mark.parametrize("part", ["transformer", "text_encoder", "vae"])
def test_calibrate_refuses_weights_beside_their_configuration(
    arguments, tiny_model, tmp_path, part
):
    """The libraries would fill what is missing with random numbers, and drop what is too much."""
    model = copy_model(tiny_model, tmp_path / "model")
    rename_weights(model / part, lambda tensors: tensors | {"extra.weight": torch.zeros(1)})
    result = calibrate(arguments | {"--model": str(model)})
    assert result.exit_code == 1
    assert "holds tensor 'extra.weight', and 0 others, for which" in result.stderr
    rename_weights(model / part, lambda tensors: dict(list(tensors.items())[2:]))
    result = calibrate(arguments | {"--model": str(model)})
    assert result.exit_code == 1
    assert f"{model / part} lacks tensor" in result.stderr
    assert not Path(arguments["--out"]).exists()


def test_calibrate_writes_scales_a_worker_can_use(arguments, tiny_model, tiny_pipe):
    result = calibrate(arguments)
    assert result.exit_code == 0, result.output
    assert "prompt 8 of 8" in result.stderr
    assert result.stdout.splitlines()[-1].endswith("20 linears, 8 prompts")
    recipe = QuantRecipe.load(arguments["--recipe"])
    scales = load_scales(Path(arguments["--out"]))
    check_scales(scales, model_fingerprint=model_fingerprint(tiny_model), recipe=recipe)
    assert scales.prompts_file == "prompts.txt"  # of an absolute path, only the name
    quantized, report = quantize_transformer(tiny_pipe.transformer, recipe, scales)
    assert report.linears == sum(isinstance(m, Hif8Linear) for m in quantized.modules()) == 20


def test_calibrate_leaves_a_preview_map_that_is_there(arguments, tiny_model, tmp_path):
    path = tmp_path / "preview-map.json"
    result = calibrate(arguments)
    assert result.exit_code == 0, result.output
    assert load_preview_map(path, tiny_model).videos == 6
    assert f"wrote {path}: fitted on 6 videos" in result.stdout
    path.write_text("mine")
    assert calibrate(arguments).exit_code == 0
    assert path.read_text() == "mine"


def test_calibrate_fits_no_map_beside_that_of_the_model(tiny_model, tmp_path):
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    own = model / DEFAULT_NAME
    own.parent.mkdir(exist_ok=True)
    own.write_text("the model's")
    _fit_beside(tmp_path / "s.safetensors", model, None, deque([torch.zeros(1)] * MIN_VIDEOS))
    assert not (tmp_path / "preview-map.json").exists()


def test_preview_map_writes_a_map_a_worker_can_use(arguments, tiny_model, tmp_path):
    path = tmp_path / "map.json"
    del arguments["--recipe"]
    words = [word for pair in (arguments | {"--out": str(path)}).items() for word in pair]
    result = run("preview-map", *words, "--videos", "7")
    assert result.exit_code == 0, result.output
    found = load_preview_map(path, tiny_model)
    assert (found.videos, found.pixels) == (5, 2)
    assert f"explains {found.r2:.1%} of others" in result.stdout
    refused = run("preview-map", *words, "--videos", "9")
    assert refused.exit_code == 1
    assert "holds 8 prompts, fewer than the 9 videos" in refused.stderr


def test_ctrl_c_keeps_what_is_done_and_the_same_command_goes_on(arguments, tmp_path):
    out = Path(arguments["--out"])
    assert calibrate(arguments).exit_code == 0
    at_once = out.read_bytes()
    out.unlink()
    words = [word for pair in arguments.items() for word in pair]
    command = [sys.executable, "-m", "quant", "calibrate", *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    partial = out.with_name(f"{out.name}.partial")
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        wait_until(partial.exists, 120, "the first prompt is done", every_s=0.001)
        process.send_signal(signal.SIGSTOP)  # whatever it has done by now, it is not at its end
        assert partial.exists()
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGCONT)
        assert process.stderr is not None
        said = process.stderr.read()
    assert process.returncode == 130, said
    assert said.splitlines()[-1] == "stopped: the same command goes on from here"
    assert partial.exists()
    assert not out.exists()
    result = calibrate(arguments)
    assert result.exit_code == 0, result.output
    assert "going on after prompt" in result.stderr
    assert out.read_bytes() == at_once
    assert not partial.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--model": "nowhere"}, "nowhere is not a pipeline in diffusers format"),
        ({"--prompts": "nowhere.txt"}, "cannot read prompts from nowhere.txt"),
        ({"--out": "nowhere/scales.safetensors"}, "folder nowhere for scales.safetensors does not"),
        ({"--recipe": "nowhere"}, "no recipe 'nowhere'"),
        ({"--recipe": "boundary-hif8"}, "this one has 4: write a recipe with total_blocks"),
        ({"--steps": "2"}, "steps 2 must be at least 4"),
        ({"--frames": "4"}, "frames 4 must be 4k + 1"),
        ({"--size": "33x32"}, "size 33x32 must be in multiples of 16"),
        ({"--out": "."}, ". is a folder: name a file in it, such as NAME"),
        ({"--guidance-scale": "nan"}, "guidance scale nan must be a number from 1 up"),
        ({"--guidance-scale": "-3"}, "guidance scale -3 must be a number from 1 up"),
        ({"--seed": "-5"}, "seed -5 must be from 0 to"),
        ({"--flow-shift": "inf"}, "flow shift inf must be a number above 0"),
        ({"--text-tokens": "3"}, "'a red box' has 6 tokens, the limit is 3: shorten it"),
        ({"--negative-prompt": "grey " * 30}, "tokens, the limit is 16: shorten it"),
        ({"--until": "1000%"}, "until '1000%' must be a share of the scales above 0%"),
        ({"--max-prompts": "7"}, "7 prompts are too few, calibration needs at least 8"),
        ({"--config": "nowhere.toml"}, "cannot read the worker's configuration nowhere.toml"),
    ],
)
def test_bad_input_ends_calibrate_with_one_sentence(arguments, changes, message, monkeypatch):
    """All of it is found before the weights are read, which takes minutes for the 14B."""
    monkeypatch.setattr(cli, "load_pipeline", unloadable)
    result = calibrate(arguments | changes)
    assert result.exit_code == 1
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("error:"))
    assert message in line
    assert "Traceback" not in result.output


def unloadable(*_: object) -> None:
    pytest.fail("the weights were read")


def test_the_scales_of_another_model_are_not_overwritten(arguments, tiny_scales, monkeypatch):
    monkeypatch.setattr(cli, "load_pipeline", unloadable)
    out = Path(arguments["--out"])
    save_scales(dataclasses.replace(tiny_scales, model_fingerprint="sha256:00"), out)
    before = out.read_bytes()
    result = calibrate(arguments)
    assert result.exit_code == 1
    assert f"{out} holds the scales of another model, sha256:00: choose another" in result.stderr
    assert out.read_bytes() == before


def test_calibrate_samples_as_the_service_and_says_what_has_settled(arguments, tmp_path):
    (tmp_path / "worker.toml").write_text(
        "[model]\nsizes = ['32x32']\ndefault_size = '32x32'\ndefault_frames = 1\n"
        "default_steps = 4\ndefault_guidance_scale = 4\ntext_tokens = 16\n"
        "default_negative_prompt = 'a grey box'\n[model.flow_shift]\n'32x32' = 5"
    )
    prompts = [f"a {colour} box" for colour in (*COLOURS, "big", "old", "new")]
    Path(arguments["--prompts"]).write_text("\n".join(prompts))
    kept = {"--model", "--prompts", "--out", "--recipe"}
    words = {name: value for name, value in arguments.items() if name in kept}
    words |= {"--config": str(tmp_path / "worker.toml"), "--max-prompts": "9", "--until": "100%"}
    result = calibrate(words)
    assert result.exit_code == 0, result.output
    scales = load_scales(Path(arguments["--out"]))
    assert scales.sampler == SamplerSettings((32, 32), 1, 4, 4.0, 16, "a grey box", flow_shift=5.0)
    assert scales.num_prompts == 9
    assert result.stdout.splitlines()[-1].split()[:2] == ["9", "100.0%"]
    assert "of the scales have settled, not the 100.0% asked for" in result.stderr
    told = run("inspect", arguments["--out"]).stdout
    assert re.search(r"negative prompt +a grey box\n", told)
    assert re.search(r"flow shift +5\n", told)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "config.json cannot be read: Expecting"),
        ("{}", "config.json must give num_attention_heads and attention_head_dim as whole numbers"),
    ],
)
def test_a_broken_model_ends_calibrate_with_one_sentence(
    arguments, tiny_model, tmp_path, config, message
):
    model = shutil.copytree(tiny_model, tmp_path / "broken")
    (model / "transformer" / "config.json").write_text(config)
    result = calibrate(
        {k: v for k, v in arguments.items() if k != "--size"} | {"--model": str(model)}
    )
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert message in result.stderr


def test_an_unreadable_size_is_a_usage_error(arguments):
    result = calibrate(arguments | {"--size": "wide"})
    assert result.exit_code == 2
    assert "is not WIDTHxHEIGHT" in re.sub(r"\s+", " ", result.stderr)


@pytest.fixture
def scales_file(tmp_path, tiny_scales):
    save_scales(tiny_scales, tmp_path / "tiny.safetensors")
    return tmp_path / "tiny.safetensors"


def test_inspect_says_what_fits_and_shows_a_table(scales_file, tiny_scales):
    result = run("inspect", str(scales_file))
    assert result.exit_code == 0, result.output
    for fact in (
        tiny_scales.model_fingerprint,
        tiny_scales.recipe.fingerprint,
        "20 linears in 2 of 4 blocks to hif8",
        "blocks 0, 3; linears none",
        "10 prompts of prompts.txt",
        "32x32, 5 frames, 4 steps in 2 timestep groups, guidance 3, 16 text tokens",
    ):
        assert fact in result.stdout
    assert [line.split()[0] for line in result.stdout.splitlines()[-10:]] == [
        *("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0"),
        *("attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0"),
        *("ffn.net.0.proj", "ffn.net.2"),
    ]


def test_inspect_checks_a_model_and_a_recipe(scales_file, tiny_model, arguments):
    fitting = ("--model", str(tiny_model), "--recipe", arguments["--recipe"])
    result = run("inspect", str(scales_file), *fitting)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-2:] == [
        f"fits model {tiny_model}",
        f"fits recipe {arguments['--recipe']}",
    ]
    result = run("inspect", str(scales_file), "--recipe", "boundary-hif8")
    assert result.exit_code == 1
    assert "-m quant calibrate --model" in result.stderr
    other = scales_file.with_name("tiny-2.safetensors")
    assert re.search(rf"--out {other} --recipe boundary-hif8 .*--steps 4", result.stderr)
    assert "settled" in run("inspect", str(scales_file)).stdout


def test_inspect_refuses_what_is_no_scales_file(tmp_path):
    result = run("inspect", str(tmp_path / "absent"))
    assert result.exit_code == 1
    assert "there is no scales file" in result.stderr


def test_codes_prints_the_table():
    result = run("codes")
    assert result.exit_code == 0
    assert result.stdout.strip() == codes_markdown()
