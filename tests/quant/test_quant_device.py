"""Which accelerators can be used, on a machine with or without one."""

import pytest
import torch
from typer.testing import CliRunner

from quant.cli import app
from quant.device import ACCELERATORS, available_accelerator, unavailable_reason, usable_device
from quant.errors import QuantError


def test_the_cpu_is_always_usable():
    assert usable_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("kind", ACCELERATORS)
def test_an_accelerator_is_usable_or_a_reason_is_given(kind):
    reason = unavailable_reason(kind)
    if reason is None:
        assert usable_device(kind).type == kind
        return
    with pytest.raises(QuantError, match=f"device {kind} is not available here: .*--device cpu"):
        usable_device(kind)


def test_an_accelerator_that_has_to_be_imported_is_not_available(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if not hasattr(torch, "npu"):
        assert available_accelerator() is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert available_accelerator() is not None


@pytest.mark.parametrize("kind", ACCELERATORS)
def test_the_commands_refuse_a_device_that_is_not_there_in_one_sentence(
    tmp_path, tiny_model, tiny_recipe, kind
):
    if unavailable_reason(kind) is None:
        assert usable_device(kind).type == kind
        return
    recipe, prompts = tmp_path / "tiny.json", tmp_path / "prompts.txt"
    recipe.write_text(tiny_recipe.to_json())
    prompts.write_text("".join(f"circle number {i}\n" for i in range(8)))
    out = tmp_path / "out"
    common = ["--model", str(tiny_model), "--recipe", str(recipe), "--out", str(out)]
    sizes = ["--size", "32x32", "--frames", "1", "--steps", "4", "--text-tokens", "16"]
    for command in (
        ["calibrate", *common, "--prompts", str(prompts), *sizes],
        ["convert", *common, "--scales", str(tmp_path / "scales.safetensors")],
    ):
        done = CliRunner().invoke(app, [*command, "--device", kind])
        assert done.exit_code == 1
        assert f"error: device {kind} is not available here: " in done.stderr
        assert not out.exists()
