"""Each format of LoRAs, from files: what is merged is the sum that the format means."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from quant import LoraSource, read_loras
from quant.errors import WeightsError
from quant.transformer.import_original import diffusers_name, original_name
from tests.quant.transformer.lora.lora_files import (
    ALPHA,
    FORMATS,
    MODULES,
    RANK,
    assert_rounded_once,
    by_diffusers,
    diffusers_tensors,
    original_module,
    product,
    random_factors,
)
from tests.quant.weights import model_folders


@pytest.fixture
def factors(tiny_transformer):
    return random_factors(tiny_transformer.state_dict())


def merged_weights(transformer, model, *sources):
    """Merge LoRAs into a copy of a transformer's weights; return those before and after."""
    before = {name: each.clone() for name, each in transformer.state_dict().items()}
    read_loras(model, sources).merge(transformer)
    return before, transformer.state_dict()


@pytest.mark.parametrize("write", FORMATS)
def test_every_format_is_merged(write, tiny_transformer, tiny_model, factors, tmp_path):
    source = LoraSource(write(tmp_path, factors), 0.75)
    before, after = merged_weights(tiny_transformer, tiny_model, source)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"{module}.weight" for module in MODULES}
    for module, pair in factors.items():
        exact = before[f"{module}.weight"].double() + 0.75 * ALPHA / RANK * product(pair)
        assert_rounded_once(after[f"{module}.weight"], exact)


def test_a_lora_is_the_same_in_every_format(tiny_model, factors, tmp_path):
    """Its digest says what it adds and not how it was written."""
    digests = set()
    for number, write in enumerate(FORMATS):
        folder = tmp_path / str(number)
        folder.mkdir()
        digests.add(read_loras(tiny_model, [LoraSource(write(folder, factors))]).digest)
    assert len(digests) == 1


def test_without_an_alpha_it_is_the_rank(tiny_transformer, tiny_model, factors, tmp_path):
    file = tmp_path / "lora.safetensors"
    save_file(diffusers_tensors(factors), file)
    before, after = merged_weights(tiny_transformer, tiny_model, LoraSource(file))
    name = f"{MODULES[0]}.weight"
    assert_rounded_once(after[name], before[name].double() + product(factors[MODULES[0]]))


def test_a_file_of_diffusers_itself_is_merged(tiny_transformer, tiny_model, tmp_path):
    """Of its own `add_adapter` and `save_lora_adapter`, whose output it is compared with."""
    from peft import LoraConfig  # noqa: PLC0415  # takes a second

    config = LoraConfig(
        r=RANK, lora_alpha=3, init_lora_weights=False, target_modules=["to_q", "ffn.net.2"]
    )
    weights = {name: each.clone() for name, each in tiny_transformer.state_dict().items()}
    tiny_transformer.add_adapter(config, "mine")
    tiny_transformer.save_lora_adapter(tmp_path, "mine")
    tiny_transformer.double().fuse_lora()
    tiny_transformer.unload_lora()
    loras = read_loras(tiny_model, [LoraSource(tmp_path)])
    assert len(loras.changed) == 4 * 3
    exact = tiny_transformer.state_dict()
    for name in loras.changed:
        assert not torch.equal(weights[name].double(), exact[name])
        assert_rounded_once(loras.merged(name, weights[name]), exact[name])


def test_differences_change_norms_biases_tables_and_the_patch_embedding(
    tiny_transformer, tiny_model, tmp_path
):
    state = tiny_transformer.state_dict()
    parts = {
        "blocks.0.attn1.norm_q.weight": "blocks.0.self_attn.norm_q.diff",
        "blocks.1.norm2.weight": "blocks.1.norm3.diff",
        "blocks.1.norm2.bias": "blocks.1.norm3.diff_b",
        "blocks.2.attn2.to_v.bias": "blocks.2.cross_attn.v.diff_b",
        "blocks.2.attn1.to_k.weight": "blocks.2.self_attn.k.diff",
        "blocks.3.scale_shift_table": "blocks.3.diff_m",
        "scale_shift_table": "head.modulation.diff",
        "patch_embedding.weight": "patch_embedding.diff",
        "patch_embedding.bias": "patch_embedding.diff_b",
    }
    generator = torch.Generator().manual_seed(3)
    changes = {name: torch.randn(state[name].shape, generator=generator) / 8 for name in parts}
    tensors = {f"diffusion_model.{parts[name]}": change for name, change in changes.items()}
    # A factor's alpha is not that of the difference beside it.
    down, up = torch.ones(1, 32), torch.ones(32, 1)
    tensors |= {
        "diffusion_model.blocks.2.self_attn.k.lora_down.weight": down,
        "diffusion_model.blocks.2.self_attn.k.lora_up.weight": up,
        "diffusion_model.blocks.2.self_attn.k.alpha": torch.tensor([0.5]),
    }
    save_file(tensors, tmp_path / "lora.safetensors")
    source = LoraSource(tmp_path / "lora.safetensors", -0.5)
    before, after = merged_weights(tiny_transformer, tiny_model, source)
    for name, change in changes.items():
        exact = before[name].double() - 0.5 * change.double()
        if name == "blocks.2.attn1.to_k.weight":
            exact -= 0.5 * 0.5
        assert_rounded_once(after[name], exact)


def test_loras_are_added_up_before_they_are_rounded(
    tiny_transformer, tiny_model, factors, tmp_path
):
    other = random_factors(tiny_transformer.state_dict(), seed=6, rank=2)
    sources = []
    for name, pairs in (("a", factors), ("b", other)):
        file = tmp_path / f"{name}.safetensors"
        save_file(diffusers_tensors(pairs), file)
        sources.append(LoraSource(file, 0.5 if name == "a" else -0.01))
    before, after = merged_weights(tiny_transformer, tiny_model, *sources)
    one_by_one = read_loras(tiny_model, sources[:1]), read_loras(tiny_model, sources[1:])
    differ = 0
    for module in MODULES:
        name = f"{module}.weight"
        exact = before[name].double() + 0.5 * product(factors[module])
        assert_rounded_once(after[name], exact - 0.01 * product(other[module]))
        twice = before[name]
        for loras in one_by_one:
            twice = loras.merged(name, twice)
        differ += int((twice != after[name]).sum())
    assert differ > 0, "rounding in between would show"


def test_the_digest_is_of_tensors_and_scale(tiny_model, factors, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    source = LoraSource(by_diffusers(tmp_path / "a", factors))
    factors[MODULES[0]][0][0, 0] += 1
    other = LoraSource(by_diffusers(tmp_path / "b", factors))

    def fingerprint(*sources):
        return read_loras(tiny_model, sources).fingerprint("sha256-full-v2:00")

    found = [
        fingerprint(*sources)
        for sources in (
            [],
            [source],
            [replace(source, scale=0.5)],
            [other],
            [source, other],
        )
    ]
    assert len(set(found)) == len(found)
    assert found[0] == "sha256-full-v2:00"
    assert all(each.startswith("sha256-full-v2:00+loras-sha256-v1:") for each in found[1:])


def test_names_go_both_ways(tiny_transformer):
    for name in tiny_transformer.state_dict():
        original = original_name(name)
        assert original == model_folders.original_name(name)
        assert diffusers_name(original) == name
    assert original_name("blocks.0.attn2.add_k_proj.weight") is None
    assert original_module("blocks.0.attn1.to_out.0") == "blocks.0.self_attn.o"


def test_linears_that_kernels_join_are_copied_together(tiny_model, tiny_transformer, tmp_path):
    """A tree that had only one of three of its own would hold the other two twice, uncounted."""
    save_file(
        {
            "transformer.blocks.0.attn1.to_q.lora_A.weight": torch.ones(1, 32),
            "transformer.blocks.0.attn1.to_q.lora_B.weight": torch.ones(32, 1),
            "transformer.blocks.1.attn2.to_v.diff_b": torch.ones(32),
            "transformer.blocks.2.attn2.to_q.diff_b": torch.ones(32),
        },
        tmp_path / "lora.safetensors",
    )
    loras = read_loras(tiny_model, [LoraSource(tmp_path / "lora.safetensors")])
    assert loras.changed == {
        "blocks.0.attn1.to_q.weight",
        "blocks.1.attn2.to_v.bias",
        "blocks.2.attn2.to_q.bias",
    }
    assert loras.names == loras.changed | {
        "blocks.0.attn1.to_k.weight",
        "blocks.0.attn1.to_v.weight",
        "blocks.1.attn2.to_k.bias",
    }


@pytest.mark.parametrize(
    ("text", "path", "scale"),
    [
        ("a.safetensors", "a.safetensors", 1.0),
        ("a.safetensors:0.5", "a.safetensors", 0.5),
        ("a:b/c.safetensors", "a:b/c.safetensors", 1.0),
        ("a:b.safetensors:-2", "a:b.safetensors", -2.0),
        ("a.safetensors:0.123456789", "a.safetensors", 0.123456789),
        ("rank:64:1", "rank:64", 1.0),
    ],
)
def test_a_scale_follows_the_path(text, path, scale):
    source = LoraSource.parse(text)
    assert (str(source.path), source.scale) == (path, scale)
    assert LoraSource.parse(source.argument) == source


def test_an_adapter_config_may_have_no_pattern(tiny_model, factors, tmp_path):
    save_file(diffusers_tensors(factors), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"lora_alpha": RANK, "alpha_pattern": None})
    )
    loras = read_loras(tiny_model, [LoraSource(tmp_path)])
    assert loras.loras[0].updates[f"{MODULES[0]}.weight"][0].factor == 1


@pytest.mark.parametrize("name", ["style", "pytorch_lora_weights"])
@pytest.mark.parametrize("by_folder", [True, False])
def test_an_adapter_config_is_of_the_only_file_beside_it(
    tiny_model, factors, tmp_path, name, by_folder
):
    file = tmp_path / f"{name}.safetensors"
    save_file(diffusers_tensors(factors), file)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": RANK / 4}))
    loras = read_loras(tiny_model, [LoraSource(tmp_path if by_folder else file)])
    assert loras.loras[0].updates[f"{MODULES[0]}.weight"][0].factor == 0.25


def test_an_adapter_config_beside_several_files_is_refused(tiny_model, factors, tmp_path):
    for name in ("one", "other"):
        save_file(diffusers_tensors(factors), tmp_path / f"{name}.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": RANK / 4}))
    with pytest.raises(WeightsError, match=r"one\.safetensors or of another of the 2 files"):
        read_loras(tiny_model, [LoraSource(tmp_path / "one.safetensors")])


def test_patterns_of_alphas_hold_without_an_alpha_for_all(tiny_model, factors, tmp_path):
    save_file(diffusers_tensors(factors), tmp_path / "adapter_model.safetensors")
    patterns = {"alpha_pattern": {MODULES[0]: RANK / 2}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(patterns))
    loras = read_loras(tiny_model, [LoraSource(tmp_path)])
    assert loras.loras[0].updates[f"{MODULES[0]}.weight"][0].factor == 0.5
    assert loras.loras[0].updates[f"{MODULES[1]}.weight"][0].factor == 1
