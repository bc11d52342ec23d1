"""The model's fingerprint follows its contents and nothing else."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import save_file

from quant import fingerprint
from quant.errors import QuantError
from quant.fingerprint import model_fingerprint


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    (folder / "transformer").mkdir(parents=True)
    (folder / "transformer" / "config.json").write_text('{"_saved_by": "me", "num_layers": 4}')
    for part in (1, 2):
        weights = {"w": torch.full((64,), float(part))}
        save_file(weights, folder / "transformer" / f"part-{part}.safetensors")
    return folder


def test_a_copy_has_the_same_fingerprint(model, tmp_path):
    copy = shutil.copytree(model, tmp_path / "copy")
    assert model_fingerprint(copy) == model_fingerprint(model)
    assert model_fingerprint(model).startswith("sha256-full:")


def test_who_saved_it_does_not_count_but_the_configuration_does(model):
    before = model_fingerprint(model)
    config = model / "transformer" / "config.json"
    config.write_text(json.dumps({"num_layers": 4, "_saved_by": "you"}))
    assert model_fingerprint(model) == before
    config.write_text(json.dumps({"num_layers": 5}))
    assert model_fingerprint(model) != before


def test_one_changed_byte_changes_it(model):
    before = model_fingerprint(model)
    weights = model / "transformer" / "part-2.safetensors"
    data = bytearray(weights.read_bytes())
    data[-100] ^= 1
    weights.write_bytes(data)
    assert model_fingerprint(model) != before


def test_large_models_are_sampled_and_say_so(model):
    """A sparse file of just over 1 GiB: the middle goes unseen, header and ends do not."""
    big = model / "transformer" / "part-3.safetensors"
    with big.open("wb") as file:
        file.write((16).to_bytes(8, "little") + b'{"a": "header"}  ')
        file.truncate(fingerprint.FULL_HASH_LIMIT_BYTES)
    before = model_fingerprint(model)
    assert before.startswith("sha256-sampled:")
    changed = []
    for place in (10, 500_000, 1 << 29, fingerprint.FULL_HASH_LIMIT_BYTES - 1):
        with big.open("r+b") as file:
            file.seek(place)
            byte = file.read(1)
            file.seek(place)
            file.write(bytes([byte[0] ^ 1]))
            file.flush()
            changed.append(model_fingerprint(model) != before)
            file.seek(place)
            file.write(byte)
    assert changed == [True, True, False, True]


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b'{"num_layers": 4', "cannot be read: Expecting"),
        (b"\xff", "cannot be read: 'utf-8' codec"),
        (b"[]", "holds a list, not a JSON object"),
    ],
)
def test_a_broken_configuration_is_named(model, content, fault):
    config = model / "transformer" / "config.json"
    config.write_bytes(content)
    with pytest.raises(QuantError, match=re.escape(f"{config} {fault}")):
        model_fingerprint(model)


def test_weights_that_cannot_be_read_are_named(model):
    weights = model / "transformer" / "part-0.safetensors"
    weights.mkdir()
    with pytest.raises(QuantError, match=f"{re.escape(str(weights))} cannot be read: "):
        model_fingerprint(model)


@pytest.mark.parametrize("missing", ["config.json", "*.safetensors"])
def test_a_folder_that_is_no_pipeline_is_refused(model, missing):
    for file in (model / "transformer").glob(missing):
        file.unlink()
    with pytest.raises(QuantError, match="is not a pipeline in diffusers format"):
        model_fingerprint(model)
