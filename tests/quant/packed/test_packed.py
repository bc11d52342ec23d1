"""Packed checkpoints: the same numbers as quantizing at load time, and what is refused."""

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors import safe_open
from safetensors.torch import save_file
from typer.testing import CliRunner

from deploy.local.waiting import wait_until
from quant import (
    PackedMismatch,
    QuantError,
    QuantRecipe,
    ScalesMismatch,
    TensorReader,
    WeightsError,
    check_packed,
    convert,
    load_packed,
    load_packed_base,
    load_packed_shared,
    model_fingerprint,
    open_packed,
    quantize_transformer,
    save_scales,
)
from quant.cli import app
from quant.numerics.linear import Hif8Linear
from quant.packed.format import SHARD_PATTERN
from quant.recipe.sparse import SparseSettings
from quant.transformer.meta_model import (
    allocate,
    check_stored,
    empty_transformer,
    load_weights,
    quantized_meta_model,
    shared_quantized_meta_model,
)
from quant.transformer.module_tree import share_tree
from quant.weights.fingerprint import read_transformer_config
from quant.weights.header import SMALL_BYTES, stored_tensors
from quant.weights.writer import spec_of, split_into_shards

CPU = TensorReader(torch.device("cpu"))
BROKEN_HEADERS = [b"", b"\x00" * 7, b"\xff" * 64, b"\x08" + b"\x00" * 7 + b"[1,2,3] "]
QDATA = "blocks.1.attn1.to_q.weight_qdata"


@pytest.fixture(scope="module")
def scales_file(tmp_path_factory, tiny_scales) -> Path:
    path = tmp_path_factory.mktemp("scales") / "scales.safetensors"
    save_scales(tiny_scales, path)
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_model, tiny_recipe, scales_file) -> Path:
    out = tmp_path_factory.mktemp("packed") / "tiny"
    convert(tiny_model, tiny_recipe, scales_file, out, shard_bytes=60_000)
    return out


@pytest.fixture
def folder(made, tmp_path) -> Path:
    """Return a copy that a test may damage."""
    return Path(shutil.copytree(made, tmp_path / "packed"))


def test_an_empty_transformer_is_the_one_diffusers_makes(tiny_model):
    """The blocks are compared as well, because only one of them is constructed."""
    config = read_transformer_config(tiny_model)
    theirs = WanTransformer3DModel.from_pretrained(
        tiny_model, subfolder="transformer", torch_dtype=torch.bfloat16
    )
    ours = empty_transformer(config)

    def described(transformer):
        state = transformer.state_dict(keep_vars=True)
        return {name: (tensor.shape, tensor.dtype) for name, tensor in state.items()}

    assert described(ours) == described(theirs)
    assert [type(module) for module in ours.modules()] == [type(m) for m in theirs.modules()]
    assert len({id(parameter) for parameter in ours.parameters()}) == len(described(theirs))
    assert {key: ours.config[key] for key in config} == config


@pytest.mark.parametrize("count", [0, -1, "3", None])
def test_a_configuration_without_blocks_is_refused(tiny_model, count):
    config = read_transformer_config(tiny_model) | {"num_layers": count}
    with pytest.raises(WeightsError, match=rf"num_layers = {count!r}, not a number from 1 up"):
        empty_transformer(config)


@pytest.fixture
def bf16(tiny_model):
    """Return the model's transformer in the dtypes that diffusers gives it."""
    transformer = empty_transformer(read_transformer_config(tiny_model))
    stored = stored_tensors((tiny_model / "transformer").glob("*.safetensors"))
    return load_weights(transformer, stored, CPU)


def opened(folder: Path, tiny_model: Path, recipe: QuantRecipe):
    packed = open_packed(folder, model_folder=tiny_model, recipe=recipe)
    check_packed(packed, model_fingerprint=model_fingerprint(tiny_model), recipe=recipe)
    return packed


@torch.no_grad()
def run(transformer) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return transformer(
        hidden_states=torch.randn(1, 16, 2, 4, 4, generator=generator).to(torch.bfloat16),
        timestep=torch.tensor([700]),
        encoder_hidden_states=torch.randn(1, 8, 96, generator=generator).to(torch.bfloat16),
        return_dict=False,
    )[0]


def test_packed_and_quantized_on_the_spot_give_the_same_bits(
    made, tiny_model, tiny_recipe, tiny_scales, bf16
):
    packed = opened(made, tiny_model, tiny_recipe)
    on_the_spot, _ = quantize_transformer(bf16, tiny_recipe, tiny_scales)
    alone = load_packed(packed, CPU)
    shared = load_packed_shared(packed, bf16, CPU)
    expected = on_the_spot.state_dict()
    for other in (alone, shared):
        found = other.state_dict()
        assert found.keys() == expected.keys()
        assert all(found[name].dtype is expected[name].dtype for name in expected)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert torch.equal(run(other), run(on_the_spot))
    assert not torch.equal(run(alone), run(bf16)), "nothing was quantized"


def test_in_a_shared_copy_only_the_linears_are_new(made, tiny_model, tiny_recipe, bf16):
    shared = load_packed_shared(opened(made, tiny_model, tiny_recipe), bf16, CPU)
    ours, theirs = (dict(tree.named_parameters()) for tree in (shared, bf16))
    assert ours.keys() < theirs.keys()
    assert all(ours[name] is theirs[name] for name in ours)


def test_several_recipes_share_what_none_of_them_quantizes(
    tmp_path, made, tiny_model, tiny_recipe, tiny_scales
):
    kept = replace(tiny_recipe, name="kept", kept_linears=("blocks.1.ffn.net.2",))
    save_scales(replace(tiny_scales, recipe=kept), tmp_path / "kept.safetensors")
    convert(tiny_model, kept, tmp_path / "kept.safetensors", tmp_path / "kept")
    both = [
        opened(made, tiny_model, tiny_recipe),
        opened(tmp_path / "kept", tiny_model, kept),
    ]
    base = load_packed_base(both, CPU)
    copies = [load_packed_shared(packed, base, CPU) for packed in both]
    for packed, copy in zip(both, copies, strict=True):
        assert torch.equal(run(copy), run(load_packed(packed, CPU)))
    assert copies[0].proj_out.weight is copies[1].proj_out.weight
    assert base.blocks[1].attn1.to_q.weight.is_meta, "no mode runs it in BF16"


def test_shards_are_safetensors_files_that_say_what_they_are(made, tiny_model, tiny_recipe):
    files = sorted(made.glob(SHARD_PATTERN))
    assert len(files) > 1
    for number, file in enumerate(files, 1):
        with safe_open(file, framework="pt") as opened_file:
            metadata = opened_file.metadata()
        assert metadata["shard"] == f"{number} of {len(files)}"
        assert metadata["model_fingerprint"] == model_fingerprint(tiny_model)
        assert metadata["recipe_fingerprint"] == tiny_recipe.fingerprint
        assert "prompts.txt" in metadata["scales_from"]
    assert all(
        each.start % 16 == 0 for each in stored_tensors(files).values() if each.nbytes % 16 == 0
    )


def test_what_is_written_is_what_the_configuration_says(made, tiny_recipe, tiny_model):
    meta_model = quantized_meta_model(
        empty_transformer(read_transformer_config(tiny_model)), tiny_recipe
    )
    size = sum(tensor.nbytes for tensor in meta_model.state_dict().values())
    assert sum(each.nbytes for each in stored_tensors(made.glob(SHARD_PATTERN)).values()) == size


def test_the_large_model_takes_what_was_promised():
    """The bytes are summed on the meta device, so nothing is allocated."""
    config: dict[str, object] = {
        "num_layers": 40,
        "num_attention_heads": 40,
        "attention_head_dim": 128,
    }
    config |= {"ffn_dim": 13824, "text_dim": 4096, "freq_dim": 256, "cross_attn_norm": True}
    config |= {"in_channels": 16, "out_channels": 16, "qk_norm": "rms_norm_across_heads"}
    bf16 = empty_transformer(config)
    w8a8 = quantized_meta_model(bf16, QuantRecipe.load("boundary-hif8"))
    assert sum(isinstance(module, Hif8Linear) for module in w8a8.modules()) == 350
    assert gib(bf16) == pytest.approx(26.67, abs=0.01)
    assert gib(w8a8) == pytest.approx(15.22, abs=0.01)
    assert gib(bf16, w8a8) < 40


def test_large_tensors_of_a_shard_lie_one_behind_the_other(tiny_model, tiny_recipe):
    """Many are then read at once. Blocks are in order, so that they can be fused early."""
    config = read_transformer_config(tiny_model) | {"num_attention_heads": 8, "ffn_dim": 8192}
    meta_model = quantized_meta_model(empty_transformer(config), tiny_recipe)
    specs = [spec_of(name, tensor) for name, tensor in meta_model.state_dict().items()]
    sizes = {name: tensor.nbytes for name, tensor in meta_model.state_dict().items()}
    shards = [[name for name, _, _ in shard] for shard in split_into_shards(specs, 6_000_000)]
    assert len(shards) > 1
    for shard in shards:
        large = [name for name in sizes if name in shard and sizes[name] >= SMALL_BYTES]
        assert shard[: len(large)] == large
        odd = [sizes[name] % 16 != 0 for name in shard]
        assert odd == sorted(odd)
    assert sum(size >= SMALL_BYTES for size in sizes.values()) > 2 * len(shards)


def test_small_tensors_of_a_file_are_taken_first(made, tiny_model, tiny_recipe, monkeypatch):
    monkeypatch.setattr("quant.weights.header.SMALL_BYTES", 500)
    packed = opened(made, tiny_model, tiny_recipe)
    meta_model = share_tree(
        shared_quantized_meta_model(packed.info.transformer_config, tiny_recipe), lambda *_: None
    )
    taken = [stored for stored, _ in allocate(meta_model, packed.stored, torch.device("cpu"))]
    assert {each.name for each in taken} == packed.stored.keys()
    positions = [(each.file, each.nbytes >= 500, each.start) for each in taken]
    assert positions == sorted(positions)
    assert {large for _, large, _ in positions} == {False, True}


def test_a_shared_meta_model_stays_one_and_empty(made, tiny_model, tiny_recipe):
    packed = opened(made, tiny_model, tiny_recipe)
    config = packed.info.transformer_config
    before = shared_quantized_meta_model(config, tiny_recipe)
    first, second = load_packed(packed, CPU), load_packed(packed, CPU)
    assert shared_quantized_meta_model(config, tiny_recipe) is before
    assert all(parameter.is_meta for parameter in before.parameters())
    ours = {id(tensor) for tensor in first.state_dict(keep_vars=True).values()}
    assert ours.isdisjoint(id(tensor) for tensor in second.state_dict(keep_vars=True).values())


def gib(*trees) -> float:
    """Sum the GiB of several trees, counting every shared tensor once."""
    tensors = {id(t): t for tree in trees for t in (*tree.parameters(), *tree.buffers())}
    return sum(tensor.nbytes for tensor in tensors.values()) / 2**30


def rewrite(folder: Path, name: str, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """Change the tensors of the shard that contains `name`; its metadata stays."""
    file = stored_tensors(folder.glob(SHARD_PATTERN))[name].file
    with safe_open(file, framework="pt") as opened_file:
        metadata = opened_file.metadata()
        tensors = {key: opened_file.get_tensor(key) for key in opened_file.keys()}  # noqa: SIM118
    change(tensors)
    save_file(tensors, file, metadata)
    return file


CHANGES: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor | None], str]] = {
    "missing": (lambda _: None, r"lacks tensor '{name}', and 0 others"),
    "another shape": (lambda t: t[:-1].clone(), r"'{name}' in .* has shape \[31, 32\], not \[32"),
    "another dtype": (lambda t: t.to(torch.bfloat16), r"'{name}' in .*bfloat16, not torch.uint8"),
}


@pytest.mark.parametrize("fault", CHANGES)
def test_a_tensor_that_is_not_as_it_should_be_is_named(folder, tiny_model, tiny_recipe, fault):
    change, message = CHANGES[fault]

    def apply(tensors):
        changed = change(tensors.pop(QDATA))
        tensors |= {} if changed is None else {QDATA: changed}

    rewrite(folder, QDATA, apply)
    with pytest.raises(WeightsError, match=message.format(name=re.escape(QDATA))):
        opened(folder, tiny_model, tiny_recipe)


def test_a_wide_tensor_in_bf16_is_refused(folder, tiny_model, tiny_recipe):
    name = "blocks.1.scale_shift_table"
    rewrite(folder, name, lambda tensors: tensors.update({name: tensors[name].bfloat16()}))
    with pytest.raises(WeightsError, match=rf"'{name}' .*bfloat16, not torch\.float32"):
        opened(folder, tiny_model, tiny_recipe)


def test_a_file_that_was_cut_is_refused_with_the_tensor(folder, tiny_model, tiny_recipe):
    stored = stored_tensors(folder.glob(SHARD_PATTERN))[QDATA]
    stored.file.write_bytes(stored.file.read_bytes()[: stored.start + 5])
    with pytest.raises(WeightsError, match=rf"within tensor '{QDATA}'.*cut"):
        opened(folder, tiny_model, tiny_recipe)


def test_a_file_that_is_cut_after_it_was_checked_is_named(folder, tiny_model, tiny_recipe):
    packed = opened(folder, tiny_model, tiny_recipe)
    file = packed.stored[QDATA].file
    file.write_bytes(file.read_bytes()[: packed.stored[QDATA].start + 5])
    with pytest.raises(WeightsError, match=rf"{file.name} ends after .* within tensor .*{QDATA}"):
        load_packed(packed, CPU)


@pytest.mark.parametrize("header", BROKEN_HEADERS)
def test_a_file_of_something_else_is_refused(folder, tiny_model, tiny_recipe, header):
    file = sorted(folder.glob(SHARD_PATTERN))[0]
    file.write_bytes(header)
    with pytest.raises(WeightsError, match=rf"{file.name} is not a safetensors file"):
        opened(folder, tiny_model, tiny_recipe)


def with_header(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the header of a safetensors file and nothing else."""
    data = file.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])


def test_metadata_that_is_none_is_refused(folder, tiny_model, tiny_recipe):
    file = sorted(folder.glob(SHARD_PATTERN))[0]
    with_header(file, lambda header: header.update(__metadata__=None))
    with pytest.raises(WeightsError, match=rf"{file.name} is not a safetensors file: .*metadata"):
        opened(folder, tiny_model, tiny_recipe)


def test_a_configuration_that_is_none_is_refused(folder, tiny_model, tiny_recipe):
    for file in folder.glob(SHARD_PATTERN):
        with_header(file, lambda header: header["__metadata__"].update(transformer_config="[]"))
    with pytest.raises(WeightsError, match=r"does not say what it was made of.*transformer_config"):
        opened(folder, tiny_model, tiny_recipe)


def test_tensors_that_lie_upon_each_other_are_refused(folder, tiny_model, tiny_recipe):
    file = stored_tensors(folder.glob(SHARD_PATTERN))[QDATA].file

    def shift(header: dict[str, Any]) -> None:
        start, end = header[QDATA]["data_offsets"]
        header[QDATA]["data_offsets"] = [start - 8, end - 8]

    with_header(file, shift)
    with pytest.raises(WeightsError, match=rf"{file.name} has tensor .* at byte .* is free"):
        opened(folder, tiny_model, tiny_recipe)


def test_bytes_that_belong_to_no_tensor_are_refused(folder, tiny_model, tiny_recipe):
    file = sorted(folder.glob(SHARD_PATTERN))[0]
    size = file.stat().st_size
    with file.open("ab") as stream:
        stream.write(b"more")
    with pytest.raises(WeightsError, match=rf"has {size + 4:,} bytes, .* end at {size:,}"):
        opened(folder, tiny_model, tiny_recipe)


def test_weights_in_8_bits_are_no_bf16_model(tiny_model):
    stored = stored_tensors((tiny_model / "transformer").glob("*.safetensors"))
    expected = empty_transformer(read_transformer_config(tiny_model)).state_dict()
    name = "blocks.1.ffn.net.2.weight"
    check_stored(expected, stored, source="it", exact=False)
    for dtype, fits in ((torch.float16, True), (torch.float8_e4m3fn, False)):
        stored[name] = replace(stored[name], dtype=dtype)
        if fits:
            check_stored(expected, stored, source="it", exact=False)
            continue
        with pytest.raises(WeightsError, match=rf"'{name}' in .* holds torch.float8_e4m3fn, not"):
            check_stored(expected, stored, source="it", exact=False)


def test_a_folder_that_does_not_exist_is_not_called_damaged(tmp_path):
    with pytest.raises(WeightsError, match=r"none does not exist; make it with: .* quant convert"):
        open_packed(tmp_path / "none")


def test_a_missing_file_is_named_with_the_command(folder, tiny_model, tiny_recipe):
    missing = sorted(folder.glob(SHARD_PATTERN))[1]
    missing.unlink()
    with pytest.raises(WeightsError, match=rf"lacks {missing.name}.*-m quant convert"):
        opened(folder, tiny_model, tiny_recipe)


def test_files_of_two_conversions_are_refused(folder, tiny_model, tiny_recipe):
    file = sorted(folder.glob(SHARD_PATTERN))[1]
    with safe_open(file, framework="pt") as opened_file:
        metadata = opened_file.metadata() | {"model_fingerprint": "sha256-full-v2:00"}
        tensors = {key: opened_file.get_tensor(key) for key in opened_file.keys()}  # noqa: SIM118
    save_file(tensors, file, metadata)
    with pytest.raises(WeightsError, match="different conversions"):
        opened(folder, tiny_model, tiny_recipe)


def test_other_scales_beside_it_are_refused(folder, tiny_model, tiny_recipe, tiny_scales):
    save_scales(replace(tiny_scales, prompts_file="others.txt"), folder / "scales.safetensors")
    with pytest.raises(WeightsError, match="not the scales file the checkpoint was made with"):
        opened(folder, tiny_model, tiny_recipe)


@pytest.mark.parametrize("wrong", [float("nan"), 0.0, 0.5])
@pytest.mark.parametrize("kind", ["weight_scale", "act_scale"])
def test_a_scale_that_is_not_the_scales_files_is_refused(
    folder, tiny_model, tiny_recipe, kind, wrong
):
    name = QDATA.replace("weight_qdata", kind)
    rewrite(folder, name, lambda tensors: tensors.update({name: tensors[name].fill_(wrong)}))
    message = rf"tensor '{name}' in .* has {wrong:g}, where scales.safetensors has .* convert"
    with pytest.raises(WeightsError, match=message):
        opened(folder, tiny_model, tiny_recipe)


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_damaged_scales_beside_it_are_no_reason_to_calibrate(
    folder, tiny_model, tiny_recipe, damage
):
    file = folder / "scales.safetensors"
    data = file.read_bytes()
    file.unlink()
    if damage == "cut":
        file.write_bytes(data[:-100])
    with pytest.raises(WeightsError, match=rf"{file}.* make the checkpoint again with: ") as caught:
        opened(folder, tiny_model, tiny_recipe)
    assert "-m quant convert" in str(caught.value)
    assert "calibrate" not in str(caught.value)


def test_a_checkpoint_without_fp8_attention_is_another_recipes(made, tiny_model, tiny_recipe):
    with pytest.raises(PackedMismatch, match=r"is of recipe .* -m quant convert"):
        opened(made, tiny_model, replace(tiny_recipe, attention="fp8"))


def test_a_checkpoint_serves_sparse_attention_too(made, tiny_model, tiny_recipe):
    settings = SparseSettings(0.9, (1, 2, 2), every_steps=1, dense_steps=0)
    sparse = replace(tiny_recipe, attention="sparse", sparse=settings)
    packed = opened(made, tiny_model, sparse)
    fingerprint = packed.info.model_fingerprint
    assert check_packed(packed, model_fingerprint=fingerprint, recipe=sparse) == sparse


def test_another_model_is_refused_with_the_command(made, tiny_model, tiny_recipe):
    packed = open_packed(made, model_folder=tiny_model, recipe=tiny_recipe)
    with pytest.raises(PackedMismatch, match="sha256-full-v2:00") as caught:
        check_packed(
            packed,
            model_fingerprint="sha256-full-v2:00",
            recipe=tiny_recipe,
            model_folder=tiny_model,
        )
    assert f"-m quant convert --model {tiny_model}" in str(caught.value)


def test_another_recipe_is_refused_with_the_command(made, tiny_model, tiny_recipe):
    other = replace(tiny_recipe, name="other", protected_blocks=(0,))
    with pytest.raises(PackedMismatch, match=r"'tiny'.*'other'.*-m quant convert"):
        opened(made, tiny_model, other)
    with pytest.raises(
        PackedMismatch, match="'auto-hif8' has protect = 'auto', and it holds no an"
    ):
        opened(made, tiny_model, QuantRecipe.load("auto-hif8"))


def test_another_format_version_is_refused(folder, tiny_model, tiny_recipe):
    file = sorted(folder.glob(SHARD_PATTERN))[0]
    save_file({"x": torch.zeros(1)}, file, {"format": "wan-hif8-packed", "format_version": "99"})
    with pytest.raises(PackedMismatch, match=r"packed format 99.*-m quant convert"):
        opened(folder, tiny_model, tiny_recipe)


def test_an_empty_folder_is_refused_with_the_command(tmp_path, tiny_model, tiny_recipe):
    with pytest.raises(WeightsError, match=r"not a packed checkpoint.*-m quant convert"):
        opened(tmp_path, tiny_model, tiny_recipe)


def test_nothing_is_left_of_a_conversion_that_fails(tmp_path, tiny_model, tiny_recipe, scales_file):
    def stop(done, total):
        if done == total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(tiny_model, tiny_recipe, scales_file, tmp_path / "out", on_tensor=stop)
    assert list(tmp_path.iterdir()) == []


def test_what_has_no_room_is_refused_before_it_is_written(
    tmp_path, tiny_model, tiny_recipe, scales_file, monkeypatch
):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(WeightsError, match=r"out needs \d{3},\d{3} bytes, and .* has 1,000 free"):
        convert(tiny_model, tiny_recipe, scales_file, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_of_a_command_that_is_told_to_end(tmp_path):
    model = Path(__file__).parents[3] / "models" / "wan-mini"
    command = [sys.executable, "-m", "quant", "convert", "--model", str(model)]
    command += ["--scales", str(model / "scales" / "boundary-hif8.safetensors")]
    process = subprocess.Popen([*command, "--out", str(tmp_path / "out")])
    try:

        def has_begun() -> bool:
            assert process.poll() is None
            return any(tmp_path.iterdir())

        wait_until(has_begun, 120, "something is written", every_s=0.01)
        process.terminate()
        assert process.wait(60) == 128 + signal.SIGTERM
    finally:
        process.kill()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_exists_is_not_touched(made, tiny_model, tiny_recipe, scales_file):
    before = {file: file.stat().st_mtime_ns for file in made.iterdir()}
    with pytest.raises(WeightsError, match=f"{made} exists already"):
        convert(tiny_model, tiny_recipe, scales_file, made)
    assert before == {file: file.stat().st_mtime_ns for file in made.iterdir()}


def test_the_command_says_what_it_wrote_and_refuses_in_one_sentence(
    tmp_path, tiny_model, tiny_recipe, scales_file
):
    recipe, out = tmp_path / "tiny.json", tmp_path / "out"
    recipe.write_text(tiny_recipe.to_json())
    arguments = ["--model", str(tiny_model), "--scales", str(scales_file), "--out", str(out)]
    command = ["convert", *arguments, "--recipe", str(recipe)]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0
    assert re.search(rf"wrote {out}: 20 linears packed, .* in 1 files", done.stdout)
    opened(out, tiny_model, tiny_recipe)
    again = CliRunner().invoke(app, command)
    assert again.exit_code == 1
    assert again.stderr == f"error: {out} exists already: remove it first, or name another folder\n"


def test_scales_of_another_recipe_are_not_packed(tmp_path, tiny_model, tiny_recipe, scales_file):
    other = replace(tiny_recipe, protected_blocks=(0,))
    with pytest.raises(ScalesMismatch):
        convert(tiny_model, other, scales_file, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_lacks_a_tensor_is_not_packed(tmp_path, tiny_model, tiny_recipe, tiny_scales):
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    file = next((model / "transformer").glob("*.safetensors"))
    with safe_open(file, framework="pt") as opened_file:
        tensors = {key: opened_file.get_tensor(key) for key in opened_file.keys()}  # noqa: SIM118
    del tensors["proj_out.weight"]
    save_file(tensors, file)
    scales = replace(tiny_scales, model_fingerprint=model_fingerprint(model))
    save_scales(scales, tmp_path / "scales.safetensors")
    with pytest.raises(QuantError, match=r"lacks tensor 'proj_out\.weight'"):
        convert(model, tiny_recipe, tmp_path / "scales.safetensors", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_recipe_per_channel_and_per_token_is_packed_too(
    tmp_path, tiny_model, tiny_pipe, tiny_plan, recipe_dict, bf16
):
    from quant import run_calibration  # noqa: PLC0415

    tables = {
        "weight": {"granularity": "per_channel", "policy": "pow2"},
        "act": {"granularity": "per_token", "policy": "pow2"},
    }
    recipe = QuantRecipe.from_dict(recipe_dict | tables)
    scales = run_calibration(tiny_pipe, replace(tiny_plan, recipe=recipe))
    save_scales(scales, tmp_path / "scales.safetensors")
    convert(tiny_model, recipe, tmp_path / "scales.safetensors", tmp_path / "out")
    alone = load_packed(opened(tmp_path / "out", tiny_model, recipe), CPU)
    assert torch.equal(run(alone), run(quantize_transformer(bf16, recipe, scales)[0]))
