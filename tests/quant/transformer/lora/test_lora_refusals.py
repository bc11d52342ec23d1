"""LoRAs that are refused: each by a sentence with the tensor, the number of others and a remedy."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import save_file

from quant import LoraSource, WeightsError, read_loras
from tests.quant.transformer.lora.lora_files import diffusers_tensors, random_factors

Q = "transformer.blocks.0.attn1.to_q"
SIZES = {"A": (4, 32), "B": (32, 4)}
CHANGES: dict[str, tuple[dict[str, torch.Tensor | None], str]] = {
    "no such module": (
        {"transformer.blocks.0.attn1.to_w.lora_A.weight": torch.ones(4, 32)},
        r"holds tensor '.*to_w\.lora_A\.weight', for which this transformer has no place: give",
    ),
    "blocks of a larger model": (
        {
            f"transformer.blocks.{block}.attn1.to_q.lora_{part}.weight": torch.ones(4, 32)
            for block in (4, 5)
            for part in "AB"
        },
        r"holds tensor '.*blocks\.4\..*', and 3 others, for which this transformer has no place",
    ),
    "image to video": (
        {"diffusion_model.blocks.0.cross_attn.k_img.lora_down.weight": torch.ones(4, 32)},
        r"'.*k_img\.lora_down\.weight', for which .*; it is of an image-to-video model: give",
    ),
    "image to video, in diffusers": (
        {"transformer.blocks.0.attn2.add_k_proj.lora_A.weight": torch.ones(4, 32)},
        r"'.*add_k_proj\.lora_A\.weight', .*; it is of an image-to-video model",
    ),
    "a text encoder": (
        {"lora_te_encoder_block_0.lora_down.weight": torch.ones(4, 32)},
        r"'lora_te_.*; it is of a text encoder as well",
    ),
    "DoRA": (
        {f"{Q}.lora_magnitude_vector": torch.ones(32)},
        r"'.*lora_magnitude_vector', .*\(DoRA\)",
    ),
    "LoKr": (
        {"diffusion_model.blocks.0.self_attn.q.lokr_w1": torch.ones(4, 4)},
        r"'.*lokr_w1', .*\(LyCORIS\)",
    ),
    "a part that is not known": (
        {f"{Q}.lora_C.weight": torch.ones(4, 32)},
        r"'.*lora_C\.weight', for which this transformer has no place",
    ),
    "half a pair": ({f"{Q}.lora_B.weight": None}, r"'.*to_q\.lora_A\.weight', without the other"),
    "an alpha alone": (
        {"transformer.blocks.0.attn1.to_k.alpha": torch.tensor(1.0)},
        r"'.*to_k\.alpha', without the other half of its pair",
    ),
    "two adapters": (
        {f"{Q}.lora_A.other.weight": torch.ones(4, 32)},
        r"'.*', which changes what another tensor in it changes already",
    ),
    "another width": (
        {f"{Q}.lora_A.weight": torch.ones(4, 48)},
        r"to_q\.lora_A\.weight' .* has the shape \[4, 48\], which does not fit "
        r"blocks\.0\.attn1\.to_q\.weight of shape \[32, 32\]",
    ),
    "NaN in several": (
        {f"{Q}.lora_{part}.weight": torch.full(size, torch.nan) for part, size in SIZES.items()},
        r"to_q\.lora_B\.weight' .* holds NaN or infinity, and 1 other:",
    ),
    "another rank": (
        {f"{Q}.lora_B.weight": torch.ones(32, 3)},
        r"to_q\.lora_B\.weight' .* has the shape \[32, 3\]",
    ),
    "no rank": (
        {f"{Q}.lora_A.weight": torch.ones(0, 32), f"{Q}.lora_B.weight": torch.ones(32, 0)},
        r"has the shape \[(0, 32|32, 0)\]",
    ),
    "a product for a norm": (
        {
            "transformer.blocks.0.norm2.lora_A.weight": torch.ones(1, 1),
            "transformer.blocks.0.norm2.lora_B.weight": torch.ones(32, 1),
        },
        r"norm2\.lora_[AB]\.weight' .* does not fit blocks\.0\.norm2\.weight of shape \[32\]",
    ),
    "a difference of another shape": (
        {"diffusion_model.blocks.0.norm3.diff": torch.ones(31)},
        r"norm3\.diff' .* has the shape \[31\]",
    ),
    "alphas of a vector": (
        {f"{Q}.alpha": torch.ones(2)},
        r"to_q\.alpha' .* has the shape \[2\]",
    ),
    "8 bits": (
        {f"{Q}.lora_A.weight": torch.ones(4, 32).to(torch.float8_e4m3fn)},
        r"to_q\.lora_A\.weight' .* holds torch\.float8_e4m3fn, which is not read",
    ),
    "NaN": (
        {f"{Q}.lora_A.weight": torch.full((4, 32), torch.nan)},
        r"to_q\.lora_A\.weight' .* holds NaN or infinity",
    ),
    "infinity": (
        {"diffusion_model.blocks.0.norm3.diff": torch.full((32,), torch.inf)},
        r"norm3\.diff' .* holds NaN or infinity",
    ),
    "an infinite alpha": (
        {f"{Q}.alpha": torch.tensor(torch.inf)},
        r"to_q\.alpha' .* holds NaN or infinity",
    ),
}


@pytest.fixture
def refused(tiny_model) -> Callable[..., None]:
    """Checks that a LoRA is refused with a message."""

    def check(path, message: str) -> None:
        with pytest.raises(WeightsError, match=message) as caught:
            read_loras(tiny_model, [LoraSource(path)])
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)

    return check


@pytest.fixture
def tensors(tiny_transformer):
    return diffusers_tensors(random_factors(tiny_transformer.state_dict()))


@pytest.mark.parametrize("fault", CHANGES)
def test_a_tensor_that_does_not_fit_is_named(fault, refused, tensors, tmp_path):
    changes, message = CHANGES[fault]
    changed = {name: each for name, each in (tensors | changes).items() if each is not None}
    save_file(changed, tmp_path / "lora.safetensors")
    refused(tmp_path / "lora.safetensors", message)


def test_a_lora_of_the_small_model_does_not_fit_a_wider_one(refused, tmp_path, tiny_transformer):
    """As one of the 1.3B for the 14B: every name has its place, and no shape fits."""
    wide = {
        name: torch.ones([2 * side for side in each.shape], device="meta")
        for name, each in tiny_transformer.state_dict().items()
    }
    factors = random_factors(wide)
    save_file(diffusers_tensors(factors), tmp_path / "lora.safetensors")
    refused(tmp_path / "lora.safetensors", ", and 19 others: give a LoRA of this very model")


def test_an_empty_file_is_refused(refused, tmp_path):
    save_file({}, tmp_path / "none.safetensors")
    refused(tmp_path / "none.safetensors", "holds no tensors: copy or save it again")
    (tmp_path / "nothing.safetensors").touch()
    refused(tmp_path / "nothing.safetensors", "is not a safetensors file, or not a whole one")


def test_a_cut_file_is_refused_by_its_tensor(refused, tensors, tmp_path):
    file = tmp_path / "lora.safetensors"
    save_file(tensors, file)
    file.write_bytes(file.read_bytes()[:-10])
    refused(file, r"ends after .* within tensor 'transformer\..*the file was cut")


def test_what_is_no_safetensors_file_is_refused(refused, tensors, tmp_path):
    (tmp_path / "lora.safetensors").write_text("<html>" * 50)
    refused(tmp_path / "lora.safetensors", "is not a safetensors file")
    torch.save(tensors, tmp_path / "lora.pt")
    refused(tmp_path / "lora.pt", "is a pickle, which is not read, as it may run code")


def test_a_path_without_one_file_is_refused(refused, tensors, tmp_path):
    refused(tmp_path / "none.safetensors", "there is no LoRA .* not with 0")
    for name in ("a", "b"):
        save_file(tensors, tmp_path / f"{name}.safetensors")
    refused(tmp_path, "there is no LoRA .* not with 2")


@pytest.mark.parametrize(
    "config",
    [
        "{",
        "[]",
        json.dumps({"lora_alpha": "8"}),
        json.dumps({"lora_alpha": True}),
        json.dumps({"lora_alpha": 8, "alpha_pattern": {"(": 4}}),
        '{"lora_alpha": Infinity}',
    ],
)
def test_a_damaged_configuration_is_refused(config, refused, tensors, tmp_path):
    file = tmp_path / "adapter_model.safetensors"
    save_file(tensors, file)
    (tmp_path / "adapter_config.json").write_text(config)
    refused(tmp_path, "cannot be read")
    save_file(tensors, tmp_path / "lora.safetensors", {"lora_adapter_metadata": config})
    refused(tmp_path / "lora.safetensors", "the configuration of the LoRA .* cannot be read")


METADATA = {"transformer.lora_alpha": 8, "transformer.r": 4, "transformer.use_rslora": False}


def save_with_configurations(folder, tensors, beside) -> None:
    """Save a LoRA with what diffusers says of it inside, and what PEFT says beside it."""
    metadata = {"lora_adapter_metadata": json.dumps(METADATA)}
    save_file(tensors, folder / "adapter_model.safetensors", metadata)
    (folder / "adapter_config.json").write_text(json.dumps(beside))


@pytest.mark.parametrize(
    ("beside", "said"),
    [
        ({"lora_alpha": 16}, "lora_alpha = 8 in its metadata, .* and 16 in adapter_config.json"),
        ({"lora_alpha": None}, "lora_alpha = 8 in its metadata, .* and null in"),
        ({"use_rslora": True}, "use_rslora = null in its metadata, .* and true in"),
        ({"alpha_pattern": {"to_q": 2}}, r'alpha_pattern = null .* and {"to_q": 2} in'),
        ({"r": 8}, "r = 4 in its metadata, .* and 8 in"),
    ],
)
def test_metadata_and_a_configuration_that_contradict_each_other_are_refused(
    beside, said, refused, tensors, tmp_path
):
    """diffusers reads only the one and PEFT only the other: each would add another LoRA."""
    save_with_configurations(tmp_path, tensors, {"lora_alpha": 8, "r": 4} | beside)
    refused(tmp_path, f"{said}.*, which PEFT reads: give it a folder of its own")


@pytest.mark.parametrize("beside", [{"r": 4, "bias": "none"}, {}, {"rank_pattern": {"to_q": 4}}])
def test_metadata_and_a_configuration_that_agree_are_read(tiny_model, tensors, tmp_path, beside):
    """A rank that only one of them states is no contradiction: tensors have it."""
    save_with_configurations(tmp_path, tensors, {"lora_alpha": 8.0} | beside)
    (lora,) = read_loras(tiny_model, [LoraSource(tmp_path)]).loras
    assert {update.factor for each in lora.updates.values() for update in each} == {2.0}


def test_a_configuration_of_several_files_does_not_contradict_metadata(
    tiny_model, tensors, tmp_path
):
    """It may be of any of them, and this one says itself how it is scaled."""
    save_with_configurations(tmp_path, tensors, {"lora_alpha": 16})
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "a.safetensors")
    save_file(tensors, tmp_path / "b.safetensors")
    (lora,) = read_loras(tiny_model, [LoraSource(tmp_path / "a.safetensors")]).loras
    assert {update.factor for each in lora.updates.values() for update in each} == {2.0}


@pytest.mark.parametrize(
    ("config", "tensor", "said"),
    [
        ({"r": 8}, {}, "lora_A.weight' of .* has rank 4, and its configuration says 8"),
        ({"r": 4, "rank_pattern": {"attn1.to_q": 2}}, {}, "to_q.* has rank 4, .* says 2"),
        ({"lora_alpha": 8}, {f"{Q}.alpha": torch.tensor(4.0)}, "alpha' of .* by 1, and .* by 2"),
    ],
)
def test_tensors_that_a_configuration_contradicts_are_refused(
    config, tensor, said, refused, tensors, tmp_path
):
    save_file(tensors | tensor, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    refused(tmp_path, f"{said}.*: they are of different trainings; copy both again")


def test_a_scale_has_to_be_a_number():
    with pytest.raises(WeightsError, match=r"a\.safetensors cannot have the scale inf: give"):
        LoraSource.parse("a.safetensors:inf")


def test_a_file_that_is_cut_later_is_refused_while_it_is_merged(
    tiny_transformer, tiny_model, tensors, tmp_path
):
    file = tmp_path / "lora.safetensors"
    save_file(tensors, file)
    loras = read_loras(tiny_model, [LoraSource(file)])
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(WeightsError, match="the file was cut"):
        loras.merge(tiny_transformer)
