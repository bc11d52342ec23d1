"""A folder's weights are the files that the libraries would load, in any dtype they can have."""

import json
import shlex
import struct
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors.torch import load_file, save_file
from transformers import UMT5EncoderModel

from quant.errors import QuantError, WeightsError
from quant.transformer.meta_model import empty_transformer, load_weights
from quant.weights.fingerprint import model_fingerprint, read_transformer_config
from quant.weights.header import DTYPES, read_header
from quant.weights.reader import TensorReader
from quant.weights.weight_files import stored_weights, weight_files
from tests.quant.weights.model_folders import copy_model, rename_weights

STEM = "diffusion_pytorch_model"


def split(folder: Path, count: int, *, index: bool, scale: float = 1.0) -> list[str]:
    """Store a folder's transformer in `count` files, times `scale`; return their names."""
    whole = folder / f"{STEM}.safetensors"
    tensors = load_file(whole)
    names = [f"{STEM}-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    parts = [sorted(tensors)[n::count] for n in range(count)]
    for name, part in zip(names, parts, strict=True):
        save_file({each: tensors[each] * scale for each in part}, folder / name)
    if index:
        weight_map = {each: n for n, part in zip(names, parts, strict=True) for each in part}
        text = json.dumps({"metadata": {}, "weight_map": weight_map})
        (folder / f"{STEM}.safetensors.index.json").write_text(text)
    return names


@pytest.fixture
def model(tmp_path, tiny_model):
    return copy_model(tiny_model, tmp_path / "model")


@pytest.fixture
def folder(model):
    return model / "transformer"


def test_of_two_splits_the_one_that_the_index_names_is_read(model, folder):
    names = split(folder, 3, index=True)
    others = split(folder, 2, index=False, scale=2.0)
    (folder / f"{STEM}.safetensors").unlink()
    assert [file.name for file in weight_files(folder)] == names
    before = model_fingerprint(model)
    ours = load_weights(
        empty_transformer(read_transformer_config(model)),
        stored_weights(folder),
        TensorReader(torch.device("cpu")),
    )
    theirs = WanTransformer3DModel.from_pretrained(folder, torch_dtype=torch.bfloat16)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name
    for other in others:  # what is not read is not part of the model's identity
        (folder / other).unlink()
    assert model_fingerprint(model) == before


def test_two_splits_without_an_index_are_refused_with_the_remedy(folder):
    split(folder, 3, index=False)
    split(folder, 2, index=False)
    (folder / f"{STEM}.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"is in .*-of-00002\.\w+ and in .* add the index"):
        stored_weights(folder)


def test_a_file_that_the_libraries_do_not_read_is_not_read(folder):
    save_file({"proj_out.weight": torch.zeros(1)}, folder / f"{STEM}.fp16.safetensors")
    assert [file.name for file in weight_files(folder)] == [f"{STEM}.safetensors"]


def test_a_tensor_in_two_shards_is_read_where_the_index_says(folder):
    names = split(folder, 2, index=True)
    tensors = load_file(folder / names[1]) | {"proj_out.bias": torch.zeros(64)}
    first = "proj_out.bias" in load_file(folder / names[0])
    assert first, "the test needs the tensor in the first shard"
    save_file(tensors, folder / names[1])
    assert stored_weights(folder)["proj_out.bias"].file.name == names[0]


@pytest.mark.parametrize("library", ["diffusers", "transformers"])
def test_an_index_beside_a_whole_file_is_taken_as_the_library_does(tmp_path, library):
    stem, whole_first = {"diffusers": (STEM, False), "transformers": ("model", True)}[library]
    save_file({"a": torch.zeros(1)}, tmp_path / f"{stem}.safetensors")
    save_file({"a": torch.ones(1)}, tmp_path / "shard.safetensors")
    text = json.dumps({"weight_map": {"a": "shard.safetensors"}})
    (tmp_path / f"{stem}.safetensors.index.json").write_text(text)
    expected = f"{stem}.safetensors" if whole_first else "shard.safetensors"
    assert [file.name for file in weight_files(tmp_path)] == [expected]


INDICES = {
    "{": "cannot be read as an index",
    "[]": "cannot be read as an index",
    '{"weight_map": {}}': "its weight_map is empty",
    '{"weight_map": {"a": "../a.safetensors"}}': "'../a.safetensors' is no file of its folder",
    '{"weight_map": {"a": "/etc/a.safetensors"}}': "'/etc/a.safetensors' is no file",
    '{"weight_map": {"a": 5}}': "5 is no file of its folder",
    '{"weight_map": {"a": "gone.safetensors"}}': "lacks gone.safetensors that",
    "[" * 100_000: "cannot be read as an index",
}


@pytest.mark.parametrize("text", INDICES)
def test_a_broken_index_is_refused_by_name(folder, text):
    (folder / f"{STEM}.safetensors.index.json").write_text(text)
    with pytest.raises(WeightsError) as caught:
        weight_files(folder)
    assert INDICES[text] in str(caught.value)
    assert str(folder) in str(caught.value)


def test_hidden_files_are_skipped(model, folder):
    before = model_fingerprint(model)
    for part in ("transformer", "text_encoder", "vae"):
        (model / part / "._x.safetensors").write_bytes(b"\0\5\x16\7 resource fork")
        (model / part / ".x").write_bytes(b"x")
        (model / part / "._config.json").write_bytes(b"\0\5\x16\7")
        (model / part / f"._{STEM}.safetensors.index.json").write_bytes(b"\0\5")
    assert model_fingerprint(model) == before
    assert len(stored_weights(folder)) == len(load_file(folder / f"{STEM}.safetensors"))


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9935231704\n"


@pytest.mark.parametrize(
    "name",
    [
        f"transformer/{STEM}.safetensors",
        "text_encoder/model.safetensors",
        f"vae/{STEM}.safetensors",
        f"transformer/{STEM}.safetensors.index.json",
    ],
)
def test_a_git_lfs_pointer_is_named(model, name):
    (model / name).write_bytes(POINTER)
    with pytest.raises(
        QuantError, match=r"is a Git LFS pointer .* run `git lfs pull` in"
    ) as caught:
        model_fingerprint(model)
    assert str(model / name) in str(caught.value)


def store(file: Path, dtype: str, shape: list[int], size: int) -> None:
    """Write a safetensors file by hand, because the library does not write all of its dtypes."""
    fields = {"w": {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}
    header = json.dumps(fields).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(size))


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_that_torch_has_is_read(tmp_path, name):
    store(tmp_path / "x.safetensors", name, [4], 4 * DTYPES[name].itemsize)
    assert read_header(tmp_path / "x.safetensors").tensors[0].dtype is DTYPES[name]


@pytest.mark.parametrize(("name", "size"), [("F4", 2), ("F6_E2M3", 3), ("Q9", 4)])
def test_a_dtype_that_torch_lacks_is_named(tmp_path, name, size):
    store(tmp_path / "x.safetensors", name, [4], size)
    with pytest.raises(WeightsError, match=f"'w' in .* has the dtype {name}, which is not read"):
        read_header(tmp_path / "x.safetensors")


PICKLES = {
    "transformer": (WanTransformer3DModel, f"{STEM}.bin"),
    "text_encoder": (UMT5EncoderModel, "pytorch_model.bin"),
    "vae": (AutoencoderKLWan, f"{STEM}.bin"),
}


@pytest.mark.parametrize("part", PICKLES)
def test_pickled_weights_are_refused_with_a_command_that_converts_them(model, part):
    loader, name = PICKLES[part]
    folder = model / part
    file = next(folder.glob("*.safetensors"))
    torch.save(load_file(file), folder / name)
    file.unlink()
    with pytest.raises(QuantError, match=rf"as a pickle only \({name}\)") as caught:
        model_fingerprint(model)
    python, option, code = shlex.split(str(caught.value).partition("convert it with: ")[2])
    assert (python, option) == ("python", "-c")
    assert loader.__name__ in code
    exec(code)
    model_fingerprint(model)


def test_a_tokenizer_in_sentencepiece_alone_is_refused_with_the_remedy(model):
    (model / "tokenizer" / "tokenizer.json").unlink()
    (model / "tokenizer" / "spiece.model").write_bytes(b"\n\x0e")
    with pytest.raises(QuantError, match=r"SentencePiece model only .* tokenizer\.json is needed"):
        model_fingerprint(model)


@pytest.mark.parametrize("kept", ["shared.weight", "encoder.embed_tokens.weight", "both"])
def test_one_embedding_is_kept_whatever_its_name(model, kept):
    folder = model / "text_encoder"

    def rename(tensors):
        embedding = tensors.pop("shared.weight")
        names = ("shared.weight", "encoder.embed_tokens.weight") if kept == "both" else (kept,)
        return tensors | {name: embedding.clone() for name in names}

    rename_weights(folder, rename)
    embeddings = [n for n in stored_weights(folder) if "shared" in n or "embed_tokens" in n]
    assert embeddings == [kept if kept != "both" else "encoder.embed_tokens.weight"]
