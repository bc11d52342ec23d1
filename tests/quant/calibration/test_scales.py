"""The scales file: round trip, size, atomic writing, and every way it can be wrong."""

import dataclasses
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from quant.calibration.sampler import SamplerSettings
from quant.calibration.scales import (
    Scales,
    check_replaceable,
    check_scales,
    load_scales,
    save_scales,
)
from quant.errors import CalibrationError, ScalesError, ScalesMismatch
from quant.numerics.scaling import NUM_BINADES, POLICIES
from quant.recipe.recipe import QuantRecipe

MAX_BYTES = 1_500_000
COMMAND = f"{shlex.quote(sys.executable)} -m quant calibrate"
DEVICE = ("--device", "cuda") if torch.cuda.is_available() else ()


@pytest.fixture
def path(tmp_path, tiny_scales: Scales):
    save_scales(tiny_scales, tmp_path / "s.safetensors")
    return tmp_path / "s.safetensors"


def metadata_of(path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def test_what_is_saved_is_loaded(path, tiny_scales: Scales):
    loaded = load_scales(path)
    for field in dataclasses.fields(Scales):
        ours, theirs = getattr(loaded, field.name), getattr(tiny_scales, field.name)
        if isinstance(ours, torch.Tensor):
            assert torch.equal(ours, theirs), field.name
        elif isinstance(ours, dict):
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[key], theirs[key]) for key in ours)
        else:
            assert ours == theirs, field.name


def test_the_metadata_says_where_it_comes_from(path, tiny_scales: Scales):
    metadata = metadata_of(path)
    assert metadata["format_version"] == "1"
    assert metadata["model_fingerprint"].startswith("sha256-full-v2:")
    assert json.loads(metadata["recipe"])["name"] == "tiny"
    assert len(metadata["prompts_sha256"]) == 64
    assert metadata["tool_version"]
    assert json.loads(metadata["sampler"])["num_inference_steps"] == 4


@pytest.mark.parametrize("wrong", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["weight_scale", "act_scale"])
def test_a_scale_that_is_none_is_named(tmp_path, tiny_scales: Scales, kind, wrong):
    scales = dict(getattr(tiny_scales, kind))
    name = list(scales)[3]
    scales[name] = torch.full_like(scales[name], wrong)
    changed: dict[str, Any] = {kind: scales}
    save_scales(dataclasses.replace(tiny_scales, **changed), tmp_path / "s.safetensors")
    message = rf"{name}\.{kind} has {wrong}, and scales are positive and finite"
    with pytest.raises(ScalesError, match=message):
        load_scales(tmp_path / "s.safetensors")


def test_only_the_file_is_left_behind_and_others_may_read_it(path):
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_full_sized_file_stays_small(tmp_path, tiny_scales: Scales):
    linears = tuple(f"blocks.{b}.attn1.to_out.{i}" for b in range(35) for i in range(10))
    shape = (len(linears), 4, 64)
    big = dataclasses.replace(
        tiny_scales,
        linears=linears,
        weight_scale={name: torch.tensor(1.0) for name in linears},
        act_scale={name: torch.tensor(1.0) for name in linears},
        weight_amax=torch.ones(len(linears)),
        act_amax=torch.rand(shape),
        act_mean_square=torch.rand(shape),
        act_binades=torch.rand(*shape[:2], NUM_BINADES),
    )
    save_scales(big, tmp_path / "big.safetensors")
    assert (tmp_path / "big.safetensors").stat().st_size < MAX_BYTES


def test_a_folder_that_is_not_there_is_named(tmp_path, tiny_scales: Scales):
    with pytest.raises(ScalesError, match=r"cannot write .*nowhere/s.safetensors"):
        save_scales(tiny_scales, tmp_path / "nowhere" / "s.safetensors")


def command_in(error: pytest.ExceptionInfo[ScalesError]) -> list[str]:
    """Return the arguments of the command that an error message ends with."""
    _, found, arguments = str(error.value).rpartition(COMMAND)
    assert found
    return shlex.split(arguments)


def test_matching_scales_pass(tiny_scales: Scales):
    renamed = dataclasses.replace(tiny_scales.recipe, name="other")
    fingerprint = tiny_scales.model_fingerprint
    check_scales(tiny_scales, model_fingerprint=fingerprint, recipe=renamed)


def test_another_model_is_refused_with_the_command(path, tiny_model, tiny_recipe):
    with pytest.raises(ScalesMismatch, match="calibrated on model sha256-full-v2:") as error:
        check_scales(
            load_scales(path),
            model_fingerprint="sha256-full-v2:other",
            recipe=tiny_recipe,
            path=path,
            model_folder=tiny_model,
        )
    assert command_in(error) == [
        *("--model", str(tiny_model), "--prompts", "PROMPTS_FILE"),
        *("--out", str(path.with_name("s-2.safetensors")), "--recipe", "RECIPE_FILE", *DEVICE),
    ]


def test_another_recipe_is_refused_with_the_command_and_sampler(path, tiny_model, tiny_scales):
    recipe = dataclasses.replace(
        tiny_scales.recipe, weight_policy=POLICIES["none"], source="recipes/my own.toml"
    )
    with pytest.raises(ScalesMismatch, match="scales are for recipe 'tiny'") as error:
        check_scales(
            tiny_scales,
            model_fingerprint=tiny_scales.model_fingerprint,
            recipe=recipe,
            path=path,
            model_folder=tiny_model,
        )
    assert command_in(error) == [
        *("--model", str(tiny_model), "--prompts", "PROMPTS_FILE"),
        *("--out", str(path.with_name("s-2.safetensors"))),
        *("--recipe", "recipes/my own.toml", *DEVICE),
        *("--steps", "4", "--size", "32x32", "--frames", "5"),
        *("--guidance-scale", "3", "--text-tokens", "16", "--seed", "0"),
    ]


def test_another_format_version_is_refused_with_the_command(path, tiny_model, tiny_recipe):
    metadata = metadata_of(path) | {"format_version": "2"}
    save_file({"x": torch.zeros(1)}, path, metadata)
    with pytest.raises(ScalesMismatch, match="has scales format 2, this tool reads 1") as error:
        load_scales(path, model_folder=tiny_model, recipe=tiny_recipe)
    assert command_in(error) == [
        *("--model", str(tiny_model), "--prompts", "PROMPTS_FILE"),
        *("--out", str(path.with_name("s-2.safetensors")), "--recipe", "RECIPE_FILE", *DEVICE),
    ]


def test_the_command_runs_where_its_files_can_be_found(path, tmp_path, tiny_scales, monkeypatch):
    """Scales know the name of their prompts only, and recipes that were loaded by name have one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s-2.safetensors").write_bytes(b"")
    model, recipe = tmp_path / "model", QuantRecipe.load("boundary-hif8")
    model.mkdir()
    (model / "prompts.txt").write_text("")
    for prompts in (model / "prompts.txt", Path("prompts.txt")):
        with pytest.raises(ScalesMismatch) as error:
            check_scales(
                tiny_scales,
                model_fingerprint="sha256-full-v2:other",
                recipe=dataclasses.replace(recipe, source=""),
                path=path,
                model_folder=model,
            )
        assert command_in(error) == [
            *("--model", str(model), "--prompts", str(prompts)),
            *("--out", str(path.with_name("s-3.safetensors")), "--recipe", recipe.name, *DEVICE),
        ]
        (tmp_path / "prompts.txt").write_text("")


def test_only_scales_of_the_same_model_and_recipe_may_be_replaced(path, tmp_path, tiny_scales):
    fingerprint, recipe = tiny_scales.model_fingerprint, tiny_scales.recipe
    check_replaceable(tmp_path / "absent", fingerprint, recipe)
    check_replaceable(path, fingerprint, dataclasses.replace(recipe, name="renamed"))
    with pytest.raises(ScalesError, match=rf"holds the scales of another model, {fingerprint}: ch"):
        check_replaceable(path, "sha256-full-v2:other", recipe)
    with pytest.raises(ScalesError, match="holds the scales of another recipe, 'tiny'"):
        check_replaceable(path, fingerprint, QuantRecipe.load("boundary-hif8"))
    path.write_text("notes")
    with pytest.raises(ScalesError, match="is there already and holds no scales that this tool"):
        check_replaceable(path, fingerprint, recipe)


def test_a_flow_shift_is_kept_and_left_out_where_it_is_the_models_own(tmp_path, tiny_scales):
    """Files of before the option have no such key, and files without a shift are as they were."""
    for shift in (None, 5.0):
        assert tiny_scales.sampler is not None
        sampler = dataclasses.replace(
            tiny_scales.sampler, flow_shift=shift, negative_prompt="grey, blurred"
        )
        file = tmp_path / f"{shift}.safetensors"
        save_scales(dataclasses.replace(tiny_scales, sampler=sampler), file)
        assert load_scales(file).sampler == sampler
        assert ("flow_shift" in json.loads(metadata_of(file)["sampler"])) == (shift is not None)
        words = sampler.arguments()
        assert words[words.index("--negative-prompt") + 1] == "grey, blurred"
        assert ("--flow-shift" in words) == (shift is not None)


def test_a_file_that_is_not_there_is_named_with_the_command(tmp_path):
    with pytest.raises(ScalesError, match="there is no scales file") as error:
        load_scales(tmp_path / "absent.safetensors")
    absent = str(tmp_path / "absent.safetensors")
    assert command_in(error)[-2 - len(DEVICE) :] == ["--out", absent, *DEVICE]


def test_the_command_uses_a_cuda_device_where_there_is_one(tmp_path, tiny_recipe, monkeypatch):
    for available, named in ((True, ["--device", "cuda"]), (False, ["--recipe", "RECIPE_FILE"])):
        monkeypatch.setattr(torch.cuda, "is_available", lambda value=available: value)
        with pytest.raises(ScalesError) as error:
            load_scales(tmp_path / "absent.safetensors", recipe=tiny_recipe)
        assert command_in(error)[-2:] == named


def test_files_that_are_something_else_are_refused(tmp_path, path):
    text = tmp_path / "text.safetensors"
    text.write_text("hello, this is not safetensors")
    with pytest.raises(ScalesError, match="not a scales file"):
        load_scales(text)
    save_file({"x": torch.zeros(1)}, text)
    with pytest.raises(ScalesError, match="its metadata has no format_version"):
        load_scales(text)
    save_file({"x": torch.zeros(1)}, text, metadata_of(path))
    with pytest.raises(ScalesError, match="not a scales file: KeyError"):
        load_scales(text)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (((30, 32), 5, 4, 3.0, 16), "size 30x32 must be in multiples of 16"),
        (((32, 0), 5, 4, 3.0, 16), "size 32x0 must be in multiples of 16"),
        (((32, 32), 6, 4, 3.0, 16), "frames 6 must be 4k"),
        (((32, 32), 5, 3, 3.0, 16), "steps 3 must be at least 4"),
        (((32, 32), 5, 4, float("nan"), 16), "guidance scale nan must be a number from 1 up"),
        (((32, 32), 5, 4, -3.0, 16), "guidance scale -3 must be a number from 1 up"),
        (((32, 32), 5, 4, float("inf"), 16), "guidance scale inf must be a number from 1 up"),
        (((32, 32), 5, 4, 3.0, 0), "text tokens 0 must be at least 1"),
        (((32, 32), 5, 4, 3.0, 16, "", -5), "seed -5 must be from 0 to 9223372036854775807"),
        (((32, 32), 5, 4, 3.0, 16, "", 0, 4, 0.0), "flow shift 0 must be a number above 0"),
        (((32, 32), 5, 4, 3.0, 16, "", 0, 4, float("nan")), "flow shift nan must be"),
    ],
)
def test_sampler_bounds(values, message):
    with pytest.raises(CalibrationError, match=message):
        SamplerSettings(*values)
