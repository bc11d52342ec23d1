"""Test the loading benchmark with a fabricated miniature on the CPU."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.speed import loading, loading_case
from benchmarks.speed.loading_case import Start
from quant import QuantRecipe, convert
from quant.packed.format import SHARD_PATTERN
from quant.weights.header import read_header, stored_tensors
from worker.config import load_config
from worker.device import pick_device


@pytest.fixture(scope="module")
def made(tmp_path_factory, fabricated, fabricated_scales) -> tuple[Path, Path]:
    packed = tmp_path_factory.mktemp("loading") / "packed"
    convert(fabricated, QuantRecipe.load("boundary-hif8"), fabricated_scales, packed)
    return fabricated, packed


def test_a_start_is_compared_with_a_copy_of_its_bytes(made, tmp_path, capsys):
    model, packed = made
    config = loading.write_config(tmp_path, ("w8a8",), model, packed, "boundary-hif8")
    loading_case.main(config, started=time.time(), wanted="cpu")
    start = Start(**json.loads(capsys.readouterr().out.splitlines()[-1]))
    assert start.loading_s == start.checks_s + start.model_s > 0
    frequencies = 2 * 1024 * 16 * 4  # of the rotary embedding: computed, not stored
    assert start.transformer_bytes == packed_bytes(packed) + frequencies
    rows = {row.what: row for row in loading.rows_of("packed w8a8", [start])}
    files = loading_case.files_of(model, load_config(config), only_modes=False)
    assert start.compared_tensors == len(stored_names(files)) > 1000
    size = start.transformer_bytes + start.components_bytes
    for source, speed in (
        ("safetensors", start.library_bytes_per_s),
        ("pinned", start.pinned_bytes_per_s),
    ):
        ready = rows[f"packed w8a8: ready to serve (baseline: {source})"]
        assert ready.value == round(start.loading_s, 3)
        assert ready.baseline == round(size / speed, 3)


def test_the_files_that_a_start_reads_are_those_of_its_modes(made, tmp_path):
    model, packed = made
    config = load_config(loading.write_config(tmp_path, ("w8a8",), model, packed, "boundary-hif8"))
    alone = loading_case.files_of(model, config, only_modes=True)
    assert alone == sorted(packed.glob(SHARD_PATTERN))
    whole = loading_case.files_of(model, config, only_modes=False)
    assert {file.parent.name for file in whole} == {packed.name, "text_encoder", "vae"}


def stored_names(files: list[Path]) -> set[tuple[Path, str]]:
    return {(file, each.name) for file in files for each in read_header(file).tensors}


def test_the_bf16_transformer_is_compared_too(made, tmp_path):
    model, packed = made
    config = load_config(loading.write_config(tmp_path, ("bf16",), model, packed, "boundary-hif8"))
    files = loading_case.files_of(model, config, only_modes=True)
    _, compared = loading_case.compare_with_library(files, config, pick_device("cpu"))
    assert compared == len(stored_names(files)) > 1000


@pytest.mark.parametrize("part", ["packed", "text_encoder", "vae"])
def test_a_tensor_that_differs_from_the_library_is_named(made, tmp_path, monkeypatch, part):
    model, packed = made
    config = load_config(loading.write_config(tmp_path, ("w8a8",), model, packed, "boundary-hif8"))
    files = loading_case.files_of(model, config, only_modes=False)
    load_again = loading_case.load_again

    def with_changed_biases(folder: Path, *args: Any) -> Mapping[str, torch.Tensor]:
        tensors = dict(load_again(folder, *args))
        if folder.name == part:
            tensors |= {name: tensor + 1 for name, tensor in tensors.items() if "bias" in name}
        return tensors

    monkeypatch.setattr(loading_case, "load_again", with_changed_biases)
    with pytest.raises(RuntimeError, match=rf"is not what .*{part}.* holds"):
        loading_case.compare_with_library(files, config, pick_device("cpu"))


def packed_bytes(packed: Path) -> int:
    return sum(each.nbytes for each in stored_tensors(packed.glob(SHARD_PATTERN)).values())


def test_every_case_has_a_configuration_that_loads(made, tmp_path):
    model, packed = made
    for modes in loading.CASES.values():
        config = load_config(loading.write_config(tmp_path, modes, model, packed, "boundary-hif8"))
        assert tuple(mode.name for mode in config.modes) == modes
        assert config.model.path == model.resolve()
        assert {mode.packed for mode in config.modes} <= {None, packed.resolve()}
