"""The model's fingerprint follows its contents and nothing else."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import save_file

from quant.errors import QuantError, WeightsError
from quant.weights import fingerprint
from quant.weights.fingerprint import has_transformer_weights, model_fingerprint, parts_fingerprint

CONFIGS = (
    "model_index.json",
    "transformer/config.json",
    "text_encoder/config.json",
    "vae/config.json",
    "scheduler/scheduler_config.json",
)
WEIGHTS = (
    "transformer/part-1.safetensors",
    "transformer/part-2.safetensors",
    "text_encoder/model.safetensors",
    "vae/model.safetensors",
)


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    for config in CONFIGS:
        (folder / config).parent.mkdir(parents=True, exist_ok=True)
        (folder / config).write_text('{"_saved_by": "me", "num_layers": 4}')
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_text('{"_vocabulary": ["a"]}')
    for number, weights in enumerate(WEIGHTS):
        save_file({"w": torch.full((64,), float(number))}, folder / weights)
    return folder


def test_a_copy_has_the_same_fingerprint(model, tmp_path):
    copy = shutil.copytree(model, tmp_path / "copy")
    assert model_fingerprint(copy) == model_fingerprint(model)
    assert model_fingerprint(model).startswith("sha256-full-v2:")


@pytest.mark.parametrize("config", CONFIGS)
def test_who_saved_it_does_not_count_but_the_configuration_does(model, config):
    before = model_fingerprint(model)
    origin = {"_saved_by": "you", "transformers_version": "9"}
    (model / config).write_text(json.dumps(origin | {"num_layers": 4}))
    assert model_fingerprint(model) == before
    for other in ({"num_layers": 5}, {"num_layers": 4, "_class_name": "Other"}):
        (model / config).write_text(json.dumps(other))
        assert model_fingerprint(model) != before


@pytest.mark.parametrize("file", [*WEIGHTS, "tokenizer/tokenizer.json"])
def test_one_changed_byte_changes_it(model, file):
    before = model_fingerprint(model)
    data = bytearray((model / file).read_bytes())
    data[-4] ^= 1
    (model / file).write_bytes(data)
    assert model_fingerprint(model) != before


def test_weights_that_change_places_change_it(model):
    before = model_fingerprint(model)
    one, other = (model / weights for weights in WEIGHTS[:2])
    one_data, other_data = one.read_bytes(), other.read_bytes()
    one.write_bytes(other_data)
    other.write_bytes(one_data)
    assert model_fingerprint(model) != before


def test_what_makes_no_difference_to_a_video_does_not_count(model):
    before = model_fingerprint(model)
    (model / "README.md").write_text("a model")
    (model / "scales").mkdir()
    save_file({"w": torch.zeros(1)}, model / "scales" / "s.safetensors")
    assert model_fingerprint(model) == before


def test_large_models_are_sampled_and_say_so(model):
    """A sparse file of just over 1 GiB: the middle goes unseen, header and ends do not."""
    big, size = model / "transformer" / "part-3.safetensors", fingerprint.FULL_HASH_LIMIT_BYTES
    header = json.dumps({"a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    with big.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)
    before = model_fingerprint(model)
    assert before.startswith("sha256-sampled-v2:")
    changed = []
    for place in (header.index(b'a"') + 8, 500_000, 1 << 29, big.stat().st_size - 1):
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
@pytest.mark.parametrize("config", CONFIGS)
def test_a_broken_configuration_is_named(model, config, content, fault):
    (model / config).write_bytes(content)
    with pytest.raises(QuantError, match=re.escape(f"{model / config} {fault}")):
        model_fingerprint(model)


def test_weights_that_cannot_be_read_are_named(model):
    weights = model / "transformer" / "part-0.safetensors"
    weights.mkdir()
    with pytest.raises(QuantError, match=f"{re.escape(str(weights))} cannot be read: "):
        model_fingerprint(model)


def test_cut_weights_make_no_other_model(model):
    for weights in WEIGHTS:
        data = (model / weights).read_bytes()
        (model / weights).write_bytes(data[:-4])
        with pytest.raises(WeightsError, match=rf"{weights} ends after .* within tensor 'w'"):
            model_fingerprint(model)
        (model / weights).write_bytes(data)


@pytest.mark.parametrize(
    "missing",
    [
        *(*CONFIGS, "tokenizer/tokenizer.json"),
        *("transformer/*.safetensors", "text_encoder/*.safetensors", "vae/*.safetensors"),
    ],
)
def test_a_folder_that_is_no_pipeline_is_refused(model, missing):
    for file in model.glob(missing):
        file.unlink()
    with pytest.raises(QuantError, match=re.escape(f"diffusers format: it lacks {missing};")):
        model_fingerprint(model)


def test_the_parts_fingerprint_is_blind_to_the_transformers_weights_alone(model):
    before = parts_fingerprint(model)
    for weights in WEIGHTS[:2]:
        (model / weights).unlink()
    assert parts_fingerprint(model) == before
    assert not has_transformer_weights(model)
    with pytest.raises(QuantError, match="transformer"):
        model_fingerprint(model)
    for other in (*WEIGHTS[2:], "tokenizer/tokenizer.json", *CONFIGS):
        data = (model / other).read_bytes()
        changed = data[:-1] + b"x" if other in WEIGHTS else data.replace(b"4", b"5") + b" " * 9
        (model / other).write_bytes(changed)
        assert parts_fingerprint(model) != before, other
        (model / other).write_bytes(data)
    assert parts_fingerprint(model) == before
