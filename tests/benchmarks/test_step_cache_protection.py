"""Test that captions of a batch have caches of their own, and what the comparison of sets says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from torch import Tensor
from typer import BadParameter
from typer.testing import CliRunner

from benchmarks import report
from benchmarks.fixtures.fused_transformer import fused_transformer
from benchmarks.quality import step_cache_protection
from benchmarks.quality.batched_first_block import first_block_cache
from benchmarks.quality.step_cache_protection import Found, read_set, rows_of
from mini.architecture import TEXT_WIDTH
from quant.kernels.eager import EagerKernels
from tests.quant.conftest import build_tiny_transformer, save_tiny_model
from worker.config import FirstBlockCache
from worker.engine.step_cache import step_cache

THRESHOLD = 0.1
CACHE = FirstBlockCache(method="first_block", threshold=THRESHOLD)


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def transformer() -> Any:
    return fused_transformer(build_tiny_transformer().eval(), EagerKernels())


@torch.no_grad()
def run(transformer: Any, inputs: Tensor, text: Tensor) -> Tensor:
    """Run passes of two kinds in turn, and return their outputs."""
    found = []
    for number, hidden_states in enumerate(inputs):
        for kind, sign in (("cond", 1), ("uncond", -1)):
            with transformer.cache_context(kind):
                time = torch.full((len(hidden_states),), 900 - number)
                found.append(transformer(sign * hidden_states, time, text, return_dict=False)[0])
    return torch.stack(found)


def test_each_sample_of_a_batch_has_the_decisions_that_it_has_alone(transformer: Any) -> None:
    """One sample stays, one changes each time, one does every other time, and one drifts away."""
    draw = torch.Generator().manual_seed(3)

    def noise(count: int) -> Tensor:
        return torch.randn(count, 16, 2, 4, 4, generator=draw)

    still, steps = noise(1), 6
    angles = 0.07 * torch.arange(steps).view(-1, 1, 1, 1, 1)
    samples = [
        torch.cat([still + 1e-3 * noise(1) for _ in range(steps)]),
        noise(steps),
        noise(steps // 2).repeat_interleave(2, 0),
        angles.cos() * noise(1) + angles.sin() * noise(1),
    ]
    text = torch.randn(4, 5, TEXT_WIDTH, generator=draw).bfloat16()
    inputs = torch.stack(samples, 1).bfloat16()
    with first_block_cache(transformer, THRESHOLD) as passes:
        together = run(transformer, inputs, text)
    changed = torch.stack(passes)[::2]
    assert changed.int().T.tolist() == [
        [0, 1, 1, 1, 1, 1],
        [0, 0, 0, 0, 0, 0],
        [0, 1, 0, 1, 0, 1],
        [0, 1, 1, 0, 1, 1],  # each step is small, beside the last that counted it adds up
    ]
    assert torch.equal(changed, torch.stack(passes)[1::2])
    for number in range(len(samples)):
        with step_cache(transformer, CACHE, steps):
            alone = run(transformer, inputs[:, number : number + 1], text[number : number + 1])
        assert torch.allclose(together[:, number], alone[:, 0], rtol=0.02, atol=0.02), number
        with first_block_cache(transformer, THRESHOLD):
            same = run(transformer, inputs[:, number : number + 1], text[number : number + 1])
        assert torch.equal(same, alone), "one sample has the bits of a worker"
    without = run(transformer, inputs, text)
    assert torch.allclose(together[:, 1], without[:, 1], rtol=0.02, atol=0.02)
    assert not torch.allclose(together[:, 2], without[:, 2], rtol=0.02, atol=0.02)


def test_what_a_cache_changes_in_the_difference_of_two_sets_is_a_row() -> None:
    """The first set is 2 dB better without a cache and 0.5 dB with one, so 1.5 dB are lost."""
    base = [20.0, 24.0, 31.0, 26.0]
    worse = [each - 3 for each in base]
    results = {
        ("bf16", "no cache"): Found([200.0] * 4, [200.0] * 4, [0.0] * 4),
        ("a", "no cache"): Found([each + 2 for each in base], base, [0.0] * 4),
        ("b", "no cache"): Found(base, base, [0.0] * 4),
        ("bf16", "mag"): Found([200.0] * 4, worse, [0.25] * 4),
        ("a", "mag"): Found([each + 0.5 for each in base], worse, [0.25] * 4),
        ("b", "mag"): Found(base, worse, [0.25] * 4),
    }
    rows = {row.what: row for row in rows_of(results, ["p", "q", "r", "s"])}
    assert rows["no cache: a minus b"].value == 2
    assert rows["mag: a minus b"].value == rows["mag: a minus b, median"].value == 0.5
    assert rows["mag: a minus b, cache included"].value == 0
    interaction = rows["mag: a minus b, minus that without a cache"]
    assert (interaction.value, interaction.low, interaction.high) == (-1.5, -1.5, -1.5)
    assert rows["mag: bf16, passes left out"].value == 0.25
    assert "no cache: a minus b, minus that without a cache" not in rows


def test_the_study_of_a_tiny_model_saves_each_batch_and_ends_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_tiny_model(tmp_path / "tiny")
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    app = typer.Typer()
    app.command()(step_cache_protection.main)
    words = ["--model", str(model), "--protect", "outer=0,3", "--protect", "none="]
    words += ["--count", "4", "--batch", "2", "--calibration", "8", "--steps", "4"]
    words += ["--mag-threshold", "0.5"]

    def rows(*more: str) -> tuple[dict[str, Any], dict[str, Any]]:
        result = CliRunner().invoke(app, [*words, *more])
        assert result.exit_code == 0, result.output
        (file,) = (tmp_path / "results").glob("*-cpu-step-cache-protection.json")
        document = json.loads(file.read_text())
        return document["settings"], {each["what"]: each for each in document["rows"]}

    settings, few = rows("--seconds", "0")
    assert settings["captions"] == 2, "one batch, and no time for another"
    assert settings["protected"] == {"outer": [0, 3], "none": []}
    settings, found = rows()
    assert settings["captions"] == 4
    assert found.keys() == few.keys()
    for cache in ("no cache", "first block 0.1", "MagCache 0.5"):
        better = found[f"{cache}: outer minus none"]
        assert better["low"] <= better["value"] <= better["high"]
    assert found["no cache: outer minus none"]["value"] > 0, "fewer blocks are quantized"
    left_out = found["MagCache 0.5: outer, passes left out"]["value"]
    assert 0 < left_out < 1
    assert left_out == found["MagCache 0.5: bf16, passes left out"]["value"]


@pytest.mark.parametrize("text", ["paper", "=1", "bf16=1", "paper=1,x", "paper=-1"])
def test_a_set_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(BadParameter, match="is no NAME=BLOCKS"):
        read_set(text)
    assert read_set("some=3, 1,") == ("some", (1, 3))
