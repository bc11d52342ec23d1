"""`quant import` gives what diffusers' own converter gives, in a folder that loads, or refuses."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from quant.cli import app
from quant.errors import WeightsError
from quant.transformer import import_original as module
from quant.transformer.import_original import import_original
from quant.weights.weight_files import stored_weights
from tests.quant.weights.model_folders import copy_model, original_name

MINIATURE = Path(__file__).parents[3] / "models" / "wan-mini"
ORIGINAL_CONFIG = {
    "_class_name": "WanModel",
    "model_type": "t2v",
    "dim": 128,
    "eps": 1e-06,
    "ffn_dim": 512,
    "freq_dim": 256,
    "in_dim": 16,
    "num_heads": 4,
    "num_layers": 40,
    "out_dim": 16,
    "text_len": 512,
}


@pytest.fixture(scope="module")
def weights():
    return load_file(next((MINIATURE / "transformer").glob("*.safetensors")))


@pytest.fixture(scope="module")
def original(weights):
    return {original_name(name): tensor for name, tensor in weights.items()}


def store(folder: Path, tensors, **config) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
@pytest.mark.parametrize("shard_bytes", [1 << 40, 2_000_000])
def test_it_equals_diffusers_own_converter_and_loads(
    tmp_path, weights, original, prefix, shard_bytes
):
    renamed = {f"{prefix}{name}": tensor for name, tensor in original.items()}
    source = store(tmp_path / "source", renamed, **ORIGINAL_CONFIG)
    report = import_original(source, tmp_path / "out", shard_bytes=shard_bytes)
    assert (report.shards > 1) == (shard_bytes < 1 << 40)
    theirs = convert_wan_transformer_to_diffusers(dict(original))
    ours: dict[str, Any] = {}
    for file in {each.file for each in stored_weights(tmp_path / "out").values()}:
        ours |= load_file(file)
    assert ours.keys() == theirs.keys() == weights.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype is tensor.dtype
        assert torch.equal(ours[name], tensor), name
    model, info = WanTransformer3DModel.from_pretrained(
        tmp_path / "out", torch_dtype=torch.bfloat16, output_loading_info=True
    )
    assert not any(info.values()), info
    state = model.state_dict()
    assert all(torch.equal(state[n].to(tensor.dtype), tensor) for n, tensor in weights.items())
    config = json.loads((MINIATURE / "transformer" / "config.json").read_text())
    made = json.loads((tmp_path / "out" / "config.json").read_text())
    assert made == {k: v for k, v in config.items() if k != "_diffusers_version"}


def test_the_command_makes_the_transformer_of_a_pipeline(tmp_path, original):
    """From the layout in place, with diffusers' configuration beside it, which has the heads."""
    model = copy_model(MINIATURE, tmp_path / "model")
    shutil.move(model / "transformer", tmp_path / "source")
    save_file(original, tmp_path / "source" / "diffusion_pytorch_model.safetensors")
    result = CliRunner().invoke(
        app, ["import", "--from", str(tmp_path / "source"), "--out", str(model / "transformer")]
    )
    assert result.exit_code == 0, result.output
    assert "1095 tensors in 1 file, 21,616,000 bytes" in result.stdout
    before, after = (
        json.loads((each / "config.json").read_text())
        for each in (MINIATURE / "transformer", model / "transformer")
    )
    assert after == {k: v for k, v in before.items() if k != "_diffusers_version"}


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        (4, None),
        (None, "say it with --heads"),
        (3, "3 attention heads do not divide"),
        (128, "into even"),
    ],
)
def test_heads_are_said_if_nothing_else_says_them(tmp_path, original, heads, message):
    source = store(tmp_path / "source", original)
    if message is None:
        import_original(source, tmp_path / "out", heads=heads)
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        assert (config["num_attention_heads"], config["attention_head_dim"]) == (4, 32)
    else:
        with pytest.raises(WeightsError, match=message):
            import_original(source, tmp_path / "out", heads=heads)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("width", "heads"), [(1536, 12), (5120, 40)])
def test_published_widths_have_their_heads(width, heads):
    assert module._heads(width, None, Path("x")) == {
        "num_attention_heads": heads,
        "attention_head_dim": 128,
    }


def add(name, *shape):
    return lambda tensors: tensors | {name: torch.zeros(*(shape or (1,)))}


def drop(pattern):
    return lambda tensors: {n: t for n, t in tensors.items() if not re.search(pattern, n)}


def change(name, make):
    return lambda tensors: tensors | {name: make(tensors[name])}


FAULTS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "unknown": (
        add("blocks.0.extra.weight"),
        {},
        r"'blocks\.0\.extra\.weight', and 0 others",
    ),
    "unknown kind": (add("blocks.0.ffn.0.gain"), {}, r"'blocks\.0\.ffn\.0\.gain'"),
    "all in one": (add("first_stage_model.conv1.weight"), {}, "'first_stage_model.conv1.weight'"),
    "i2v": (add("img_emb.proj.0.weight"), {}, r"image-to-video transformer \(img_emb"),
    "i2v attention": (add("blocks.0.cross_attn.k_img.weight"), {}, "k_img.weight"),
    "vace": (add("vace_blocks.0.after_proj.weight"), {}, "a VACE transformer"),
    "channels": (
        change("patch_embedding.weight", lambda t: torch.cat([t, t, t[:, :4]], 1)),
        {},
        "in_channels 36, out_channels 16",
    ),
    "no head": (drop(r"head\.head"), {}, r"proj_out\.weight: .* lacks it; give all files"),
    "a hole": (drop(r"blocks\.7\."), {}, "lacks block 7 of 40"),
    "a tensor": (drop(r"blocks\.7\.ffn\.0\.bias"), {}, r"lacks tensor 'blocks\.7\.ffn\.net\.0\.p"),
    "a shape": (
        change("blocks.7.ffn.0.bias", lambda t: t[:5]),
        {},
        r"shape \[5\], not \[512\]",
    ),
    "fp8": (
        change("blocks.7.ffn.0.weight", lambda t: t.to(torch.float8_e4m3fn)),
        {},
        "e4m3fn, not",
    ),
    "task": (dict, {"model_type": "i2v"}, "is of image-to-video"),
    "layers": (dict, {"num_layers": 30}, "says num_layers 30, and the tensors have 40"),
    "width": (dict, {"dim": 5120}, "says dim 5120, and the tensors have 128"),
    "latents": (dict, {"in_dim": 36}, "says in_channels 36, and the tensors have 16"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_it_does_not_know_is_refused_by_name(tmp_path, original, fault):
    spoil, config, message = FAULTS[fault]
    source = store(tmp_path / "source", spoil(dict(original)), **(ORIGINAL_CONFIG | config))
    result = CliRunner().invoke(
        app, ["import", "--from", str(source), "--out", str(tmp_path / "out")]
    )
    assert result.exit_code == 1, result.output
    assert re.search(message, result.stderr), result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert [each.name for each in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    "name",
    [
        "wan2.2_t2v_high_noise_14B_fp16.safetensors",
        "low_noise_model/diffusion_pytorch_model.safetensors",
    ],
)
def test_an_expert_of_wan22_is_known_by_its_name(tmp_path, original, name):
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    save_file(original, file)
    with pytest.raises(WeightsError, match=r"one of the two experts of Wan2\.2 by its name"):
        import_original(file, tmp_path / "out", heads=4)


@pytest.mark.parametrize("source", ["transformer", "", "text_encoder", "nowhere"])
def test_what_is_no_original_is_refused(tmp_path, source):
    model = copy_model(MINIATURE, tmp_path / "model")
    messages = {
        "transformer": "is in diffusers' layout already",
        "": "is a pipeline in diffusers format already",
        "text_encoder": "holds tensor 'encoder",
        "nowhere": "is no safetensors file, nor a folder",
    }
    with pytest.raises(WeightsError, match=messages[source]):
        import_original(model / source, tmp_path / "out")


def test_nothing_is_left_if_it_cannot_be_written_to_the_end(tmp_path, original):
    source = store(tmp_path / "source", original, **ORIGINAL_CONFIG)

    def fail(done, total):
        if done == total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_original(source, tmp_path / "out", on_tensor=fail)
    assert [each.name for each in tmp_path.iterdir()] == ["source"]


def test_a_folder_that_exists_is_kept(tmp_path, original):
    source = store(tmp_path / "source", original, **ORIGINAL_CONFIG)
    (tmp_path / "out").mkdir()
    with pytest.raises(WeightsError, match="exists already: remove it first"):
        import_original(source, tmp_path / "out")


def test_memory_holds_one_tensor_and_not_the_file(tmp_path):
    source, blocks = tmp_path / "source", 12
    tiny = WanTransformer3DModel(
        num_attention_heads=4, num_layers=1, text_dim=64, ffn_dim=2048, freq_dim=64
    )
    state = {original_name(name): each for name, each in tiny.state_dict().items()}
    state |= {
        name.replace("blocks.0.", f"blocks.{n}."): each.clone()
        for n in range(1, blocks)
        for name, each in state.items()
        if name.startswith("blocks.0.")
    }
    total = sum(each.nbytes for each in state.values())
    store(source, state, num_heads=4)
    del tiny, state
    code = (
        "import resource, sys; from pathlib import Path\n"
        "from quant.transformer.import_original import import_original\n"
        "from quant.transformer.meta_model import empty_transformer\n"
        "empty_transformer({'num_layers': 1})\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak(); import_original(Path(sys.argv[1]), Path(sys.argv[2]))\n"
        "print((peak() - before) * 1024)"
    )
    command = [sys.executable, "-c", code, str(source), str(tmp_path / "out")]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    assert int(run.stdout) < total / 4
