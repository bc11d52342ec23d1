"""Test that each component has exactly the tensors of its configuration, in any float dtype."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from quant import QuantError, TensorReader
from tests.quant.weights.model_folders import copy_model, rename_weights, update_json
from worker.config import WorkerConfig, load_config
from worker.device import Device
from worker.errors import ModelUnusable
from worker.model_loader import loader
from worker.model_loader.components import ComponentLoader
from worker.startup import load_engine

Tensors = dict[str, Tensor]
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def folder(model_folder: Path, tmp_path: Path) -> Path:
    return copy_model(model_folder, tmp_path / "model")


@pytest.fixture
def bf16(folder: Path) -> WorkerConfig:
    """The shipped configuration of the miniature, with the BF16 mode of this folder only."""
    shipped = load_config(ROOT / "deploy" / "wan-mini.toml")
    model = shipped.model.model_copy(update={"path": folder})
    return shipped.model_copy(update={"model": model, "modes": shipped.modes[:1]})


CONFIGS: dict[str, tuple[str, dict[str, object], str]] = {
    "fewer blocks": ("transformer", {"num_layers": 30}, "holds tensor .*, and 269 others, for wh"),
    "more blocks": ("transformer", {"num_layers": 42}, "lacks tensor 'blocks.40.*, and 53 others"),
    "no norm": ("transformer", {"cross_attn_norm": False}, "holds tensor .*, and 79 others"),
    "smaller ffn": ("transformer", {"ffn_dim": 256}, "not .256.* others have wrong shapes"),
    "other steps": ("transformer", {"freq_dim": 64}, "has shape .*, not .*64. as the config"),
    "fewer layers": ("text_encoder", {"num_layers": 2}, "holds tensor 'encoder.* 9 others, for"),
    "more layers": ("text_encoder", {"num_layers": 4}, "lacks tensor 'encoder.block.3.*9 others"),
    "other words": ("text_encoder", {"vocab_size": 500}, r"has shape \[512, 96\], not \[500, 96\]"),
    "more res blocks": ("vae", {"num_res_blocks": 2}, "lacks tensor '.*, and .* others"),
    "another width": ("vae", {"base_dim": 8}, "others have wrong shapes"),
    "no number": (
        "text_encoder",
        {"num_layers": "three"},
        "no model can be built .*num_layers",
    ),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_weights_beside_the_configuration_are_refused_at_the_start(
    folder: Path, bf16: WorkerConfig, device: Device, case: str
) -> None:
    part, values, message = CONFIGS[case]
    update_json(folder / part / "config.json", **values)
    refused(bf16, device, message, part)


def refused(config: WorkerConfig, device: Device, message: str, part: str) -> None:
    with pytest.raises((QuantError, ModelUnusable)) as caught:
        load_engine(config, device)
    text = str(caught.value)
    assert re.search(message, text), text
    assert part in text
    assert "take the config.json that came with the weights" in text
    assert "\n" not in text


@pytest.mark.parametrize("part", ["transformer", "text_encoder", "vae"])
@pytest.mark.parametrize("name", ["extra.weight", "encoder.block.0.extra", "module.proj_out.bias"])
def test_a_tensor_without_a_place_is_refused(
    folder: Path, bf16: WorkerConfig, device: Device, part: str, name: str
) -> None:
    rename_weights(folder / part, lambda tensors: tensors | {name: torch.zeros(1)})
    refused(bf16, device, f"holds tensor '{name}', and 0 others, for which", part)


HARMLESS = {
    "transformer": ("blocks.0.attn1._extra_state", "rope.freqs_cos", "rope.freqs"),
    "text_encoder": ("decoder.block.0.layer.0.SelfAttention.q.weight", "lm_head.weight"),
    "vae": ("_extra_state",),
}


def test_what_no_model_reads_may_be_there(folder: Path, bf16: WorkerConfig, device: Device) -> None:
    for part, names in HARMLESS.items():
        extra = {name: torch.zeros(3) for name in names}
        rename_weights(folder / part, lambda tensors, extra=extra: tensors | extra)  # type: ignore[misc]
    (folder / "scales" / "preview-map.json").unlink()  # it is of the VAE's whole file
    load_engine(bf16, device)


@pytest.mark.parametrize("part", ["transformer", "vae"])
def test_what_another_component_need_not_read_is_refused(
    folder: Path, bf16: WorkerConfig, device: Device, part: str
) -> None:
    rename_weights(folder / part, lambda tensors: tensors | {"lm_head.weight": torch.zeros(1)})
    refused(bf16, device, "'lm_head.weight'", part)


def rename_embedding(tensors: Tensors) -> Tensors:
    embedding = tensors.pop("shared.weight")
    return tensors | {"encoder.embed_tokens.weight": embedding}


def copy_embedding(tensors: Tensors) -> Tensors:
    return tensors | {"encoder.embed_tokens.weight": tensors["shared.weight"].clone()}


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("change", [dict, rename_embedding, copy_embedding])
def test_the_embedding_is_read_under_either_name(
    folder: Path, device: Device, tie: bool, change: Callable[[Tensors], Tensors]
) -> None:
    """Wan's own configuration says that embeddings are not tied, and stores one."""
    file = folder / "text_encoder" / "model.safetensors"
    embedding = load_file(file)["shared.weight"]
    rename_weights(file.parent, change)
    update_json(file.parent / "config.json", tie_word_embeddings=tie)
    components = ComponentLoader(folder, device)
    components.copy()
    encoder = components.finish().text_encoder
    assert torch.equal(encoder.encoder.embed_tokens.weight, embedding.to(device.dtype))
    assert encoder.shared is encoder.encoder.embed_tokens


def test_an_encoder_without_any_embedding_is_refused(
    folder: Path, bf16: WorkerConfig, device: Device
) -> None:
    def drop(tensors: Tensors) -> Tensors:
        return {name: each for name, each in tensors.items() if name != "shared.weight"}

    rename_weights(folder / "text_encoder", drop)
    refused(bf16, device, "lacks tensor 'shared.weight'", "text_encoder")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_any_wide_float_dtype_is_converted(
    folder: Path, device: Device, dtype: torch.dtype
) -> None:
    def convert(tensors: Tensors) -> Tensors:
        return {name: each.to(dtype) for name, each in tensors.items()}

    stored = {}
    for part in ("transformer", "text_encoder", "vae"):
        rename_weights(folder / part, convert)
        stored[part] = load_file(next((folder / part).glob("*.safetensors")))
    reader = TensorReader(device.torch_device)
    transformer = loader._load_bf16(folder / "transformer", device, reader)
    components = ComponentLoader(folder, device)
    components.copy()
    loaded = {
        "transformer": transformer.state_dict(),
        "text_encoder": components.text_encoder.state_dict(),
        "vae": components.vae.state_dict(),
    }
    for part, tensors in stored.items():
        for name, tensor in tensors.items():
            assert torch.equal(loaded[part][name], tensor.to(loaded[part][name].dtype)), name


@pytest.mark.parametrize("part", ["transformer", "text_encoder", "vae"])
@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.int64, torch.bool]
)
def test_other_dtypes_are_refused_with_a_sentence(
    folder: Path, bf16: WorkerConfig, device: Device, part: str, dtype: torch.dtype
) -> None:
    def recode(tensors: Tensors) -> Tensors:
        name = next(iter(tensors))
        return tensors | {name: tensors[name].to(dtype)}

    rename_weights(folder / part, recode)
    with pytest.raises(QuantError, match=f"holds {dtype}, not .*: give the model as its authors"):
        load_engine(bf16, device)


def test_hidden_files_beside_the_weights_do_not_matter(
    folder: Path, bf16: WorkerConfig, device: Device
) -> None:
    for part in ("transformer", "text_encoder", "vae", "tokenizer", "scheduler"):
        for name in ("._x.safetensors", "._config.json", ".x", ".x.json"):
            (folder / part / name).write_bytes(b"\0\5\x16\7")
    load_engine(bf16, device)


def test_the_index_is_followed_by_the_worker(
    folder: Path, bf16: WorkerConfig, device: Device
) -> None:
    file = next((folder / "transformer").glob("*.safetensors"))
    shard = file.with_name("diffusion_pytorch_model-00001-of-00001.safetensors")
    file.rename(shard)
    file.with_name("diffusion_pytorch_model-00001-of-00007.safetensors").write_bytes(b"half of it")
    weight_map = dict.fromkeys(load_file(shard), shard.name)
    index = file.with_name("diffusion_pytorch_model.safetensors.index.json")
    index.write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    load_engine(bf16, device)
