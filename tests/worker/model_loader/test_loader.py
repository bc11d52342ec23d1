"""Test what the loader refuses before it reads large tensors, and what modes share."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quant import (
    QuantError,
    QuantRecipe,
    Scales,
    ScalesError,
    ScalesMismatch,
    TensorReader,
    save_scales,
)
from quant.kernels.eager import EagerKernels
from quant.kernels.interface import AttentionScales
from quant.kernels.selection import KernelChoice
from quant.numerics.scaling import POLICIES
from quant.recipe.evidence import BlockEnergy, ProtectionEvidence, measured_recipe
from quant.weights.reader import ReadRequest
from worker.config import FirstBlockCache, WorkerConfig
from worker.device import Device
from worker.errors import ModelUnusable
from worker.model_loader import loader
from worker.model_loader.components import ComponentLoader
from worker.model_loader.loader import load_model, load_modes
from worker.model_loader.mode_plan import (
    check_folder,
    choose_kernels,
    fingerprint_model,
    plan_modes,
)
from worker.model_loader.plan_table import configured_cases
from worker.startup import load_engine

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def folder(model_folder: Path, tmp_path: Path) -> Path:
    """A copy of the miniature that a test may break."""
    return Path(shutil.copytree(model_folder, tmp_path / "model"))


def with_scales(config: WorkerConfig, path: Path) -> WorkerConfig:
    quantized = config.modes[1].model_copy(update={"scales": path})
    return config.model_copy(update={"modes": (config.modes[0], quantized)})


def test_the_miniature_is_complete(model_folder: Path) -> None:
    check_folder(model_folder)


def test_matching_scales_are_planned(config: WorkerConfig, scales: Scales) -> None:
    bf16, quantized = plan_modes(config, scales.model_fingerprint)
    assert (bf16.recipe, bf16.scales) == (None, None)
    assert quantized.recipe == QuantRecipe.load("boundary-hif8")


def test_scales_of_another_model_are_refused_with_the_command(
    config: WorkerConfig, scales: Scales, tmp_path: Path
) -> None:
    path = tmp_path / "other.safetensors"
    save_scales(replace(scales, model_fingerprint="sha256-full-v2:00"), path)
    with pytest.raises(ScalesMismatch, match="sha256-full-v2:00") as caught:
        plan_modes(with_scales(config, path), scales.model_fingerprint)
    command = str(caught.value).rpartition("-m quant calibrate ")[2]
    assert f"--model {config.model.path}" in command
    assert f"--out {path.with_stem('other-2')}" in command


def test_scales_of_another_sampling_are_served_with_a_warning(
    config: WorkerConfig, scales: Scales, tmp_path: Path, caplog
):
    assert scales.sampler is not None
    sampler = replace(scales.sampler, negative_prompt="grey", flow_shift=9.0)
    path = tmp_path / "other.safetensors"
    save_scales(replace(scales, sampler=sampler), path)
    with caplog.at_level("WARNING"):
        plan_modes(config, scales.model_fingerprint)
        assert caplog.records == []
        plan_modes(with_scales(config, path), scales.model_fingerprint)
    (record,) = caplog.records
    assert record.getMessage().startswith(
        "w8a8: its scales were calibrated with another negative prompt and flow shift (9) than is"
    )


def test_the_command_for_missing_scales_samples_as_the_mode(
    config: WorkerConfig, scales: Scales, tmp_path: Path
):
    own = {"default_steps": 4, "max_guidance_scale": 1.0, "default_guidance_scale": 1.0}
    mode = config.modes[1].model_copy(update=own | {"flow_shift": 5.0, "scales": tmp_path / "none"})
    fast = config.model_copy(update={"modes": (config.modes[0], mode)})
    with pytest.raises(ScalesError, match="--steps 4 --guidance-scale 1 --flow-shift 5"):
        plan_modes(fast, scales.model_fingerprint)


def test_scales_are_held_to_what_the_mode_itself_samples_with(
    config: WorkerConfig, scales: Scales, tmp_path: Path, caplog
):
    own = {"max_guidance_scale": 1.0, "default_guidance_scale": 1.0, "flow_shift": 5.0}
    modes = (config.modes[0], config.modes[1].model_copy(update=own))
    fast = config.model_copy(update={"modes": modes})
    assert scales.sampler is not None
    path = tmp_path / "of-the-mode.safetensors"
    fitting = replace(scales.sampler, guidance_scale=1.0, negative_prompt="grey", flow_shift=5.0)
    save_scales(replace(scales, sampler=fitting), path)
    with caplog.at_level("WARNING"):
        plan_modes(with_scales(fast, path), scales.model_fingerprint)
        assert caplog.records == []
        plan_modes(fast, scales.model_fingerprint)
    (record,) = caplog.records
    assert "guidance (3) and flow shift (the model's own) than is served" in record.getMessage()
    assert record.getMessage().endswith("--config, --steps, --guidance-scale and --flow-shift")


def test_scales_of_another_recipe_are_refused_with_the_command(
    config: WorkerConfig, scales: Scales, tmp_path: Path
) -> None:
    path = tmp_path / "other.safetensors"
    recipe = replace(scales.recipe, name="other", protected_blocks=(0, 1))
    save_scales(replace(scales, recipe=recipe), path)
    with pytest.raises(ScalesMismatch, match=r"'other'.*-m quant calibrate"):
        plan_modes(with_scales(config, path), scales.model_fingerprint)


def test_an_open_recipe_runs_with_the_blocks_that_its_scales_say(
    config_file: Path, config: WorkerConfig, scales: Scales, tmp_path: Path
) -> None:
    """The mode's fingerprint is that of the recipe with its blocks; without evidence it fails."""
    auto = QuantRecipe.load("auto-hif8")
    modes = tuple(
        mode.model_copy(update={"recipe": "auto-hif8"}) if mode.recipe else mode
        for mode in config.modes
    )
    with pytest.raises(ScalesMismatch, match="hold no analysis that has chosen their blocks"):
        plan_modes(config.model_copy(update={"modes": modes}), scales.model_fingerprint)
    energy = tuple(
        BlockEnergy(*(3 * [1.0 + (block in scales.recipe.protected_blocks)])) for block in range(40)
    )
    evidence = ProtectionEvidence(
        model_fingerprint=scales.model_fingerprint,
        recipe=measured_recipe(auto, 40).fingerprint,
        blocks=scales.recipe.protected_blocks,
        energy=energy,
        budget={"count": 5},
        prompts=8,
        points=16,
        prompts_file="prompts.txt",
        prompts_sha256="",
        points_sha256="",
        analysis_sha256="",
        options={},
        tool_version="1",
    )
    path = tmp_path / "auto.safetensors"
    save_scales(replace(scales, protection=evidence), path)
    changed = with_scales(config.model_copy(update={"modes": modes}), path)
    _, plan = plan_modes(changed, scales.model_fingerprint)
    assert plan.recipe is not None
    assert plan.recipe.fingerprint == scales.recipe.fingerprint
    assert plan.recipe.name == "auto-hif8"
    text = config_file.read_text().replace('recipe = "boundary-hif8"', 'recipe = "auto-hif8"')
    (tmp_path / "worker.toml").write_text(text.replace("scales.safetensors", "auto.safetensors"))
    case = next(configured_cases(tmp_path / "worker.toml"))
    assert case.recipes[1] == scales.recipe


def test_scales_of_another_format_are_refused_with_the_command(
    config: WorkerConfig, tmp_path: Path
) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"x": torch.zeros(1)}, path, {"format_version": "99"})
    with pytest.raises(ScalesMismatch, match=r"99.*-m quant calibrate"):
        plan_modes(with_scales(config, path), "fingerprint")


def test_missing_scales_are_refused_with_the_command(config: WorkerConfig, tmp_path: Path) -> None:
    path = tmp_path / "none.safetensors"
    with pytest.raises(QuantError, match=r"none\.safetensors.*-m quant calibrate"):
        plan_modes(with_scales(config, path), "fingerprint")


@pytest.mark.parametrize("fault", ["missing", "another format"])
def test_the_command_makes_scales_for_the_configured_recipe(
    config: WorkerConfig, scales: Scales, tmp_path: Path, fault: str
) -> None:
    recipe, path = tmp_path / "my recipe.json", tmp_path / "mine.safetensors"
    recipe.write_text(replace(scales.recipe, name="mine").to_json(), encoding="utf-8")
    if fault == "another format":
        save_file({"x": torch.zeros(1)}, path, {"format_version": "99"})
    mode = config.modes[1].model_copy(update={"recipe": str(recipe), "scales": path})
    with pytest.raises(QuantError) as caught:
        plan_modes(config.model_copy(update={"modes": (mode,)}), "fingerprint")
    command = shlex.split(str(caught.value).rpartition("with: ")[2])
    assert command[:4] == [sys.executable, "-m", "quant", "calibrate"]
    assert command[command.index("--recipe") + 1] == str(recipe)


def test_an_unknown_recipe_is_refused(config: WorkerConfig) -> None:
    mode = config.modes[1].model_copy(update={"recipe": "fp4"})
    with pytest.raises(QuantError, match=r"'fp4'.*boundary-hif8"):
        plan_modes(config.model_copy(update={"modes": (mode,)}), "fingerprint")


@pytest.mark.parametrize("name", ["model_index.json", "tokenizer", "vae/config.json"])
def test_a_missing_component_is_named(folder: Path, name: str) -> None:
    path = folder / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(ModelUnusable, match=f"lacks {name}"):
        check_folder(folder)


OTHER_INDEXES = {
    "with two transformers": {"transformer_2": ["diffusers", "WanTransformer3DModel"]},
    "holds a FluxPipeline": {"_class_name": "FluxPipeline"},
    "scheduler NoScheduler, which this diffusers lacks": {
        "scheduler": ["diffusers", "NoScheduler"]
    },
    "cannot be read": {"scheduler": None},
}


@pytest.mark.parametrize("message", OTHER_INDEXES)
def test_another_kind_of_folder_is_refused(folder: Path, message: str) -> None:
    path = folder / "model_index.json"
    index = json.loads(path.read_text(encoding="utf-8")) | OTHER_INDEXES[message]
    path.write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(ModelUnusable, match=message):
        check_folder(folder)


@pytest.mark.parametrize("text", ["{", "[]", ""])
def test_a_broken_index_is_refused(folder: Path, text: str) -> None:
    (folder / "model_index.json").write_text(text, encoding="utf-8")
    with pytest.raises(ModelUnusable, match=r"model_index\.json cannot be read"):
        check_folder(folder)


@pytest.mark.parametrize(
    "name",
    [
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/tokenizer.json",
        "scheduler/scheduler_config.json",
    ],
)
@pytest.mark.parametrize("damage", ["missing", "cut", "a list"])
def test_a_damaged_component_is_named(folder: Path, device: Device, name: str, damage: str) -> None:
    do_damage(folder / name, damage)

    def load() -> None:
        component_loader = ComponentLoader(folder, device)
        component_loader.copy()
        component_loader.finish()

    with pytest.raises(ModelUnusable, match=name.partition("/")[0]) as caught:
        load()
    assert names_file_and_fault(str(caught.value), folder / name, damage)


@pytest.mark.parametrize("modes", [slice(0, 1), slice(1, 2), slice(0, 2)])
def test_a_component_that_lacks_a_tensor_is_refused_before_its_weights_are_read(
    folder: Path, config: WorkerConfig, device: Device, modes: slice, monkeypatch
) -> None:
    model = config.model.model_copy(update={"path": folder})
    broken = config.model_copy(update={"model": model, "modes": config.modes[modes]})
    plans = plan_modes(broken, fingerprint_model(config))
    file = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    del tensors["encoder.block.0.layer.0.SelfAttention.q.weight"]
    save_file(tensors, file)
    read: list[ReadRequest] = []
    monkeypatch.setattr(
        TensorReader, "read", lambda self, wanted, arrived=None: read.extend(wanted)
    )
    with pytest.raises(QuantError, match=r"text_encoder.* lacks tensor .*SelfAttention\.q"):
        load_model(folder, plans, device)
    # Nor the transformer, if it would be quantized, because the check comes before that wait.
    quantizes = any(mode.scales is not None for mode in broken.modes)
    expected = set() if quantizes else {folder / "transformer"}
    assert {stored.file.parent for stored, _ in read} <= expected


def test_the_copy_of_components_ends_when_loading_fails(
    config: WorkerConfig, device: Device, monkeypatch
) -> None:
    """For example when a transformer that is to be quantized is damaged: components come first."""
    read: list[str] = []

    def fail(*_args: object) -> None:
        raise ModelUnusable("a damaged transformer")

    def slowly(
        _reader: TensorReader, wanted: Iterable[ReadRequest], _arrived: object = None
    ) -> None:
        for stored, _ in wanted:
            time.sleep(0.01)
            read.append(stored.name)

    monkeypatch.setattr(loader, "_build_modes", fail)
    monkeypatch.setattr(TensorReader, "read", slowly)
    plans = plan_modes(config, fingerprint_model(config))[1:2]
    with pytest.raises(ModelUnusable, match="a damaged transformer"):
        load_model(config.model.path, plans, device)
    assert len(read) < 10


@pytest.mark.parametrize(("policy", "rows"), [("pow2", False), ("amax15", True)])
def test_kernels_are_tried_as_the_recipe_multiplies(
    config: WorkerConfig, device: Device, monkeypatch, policy: str, rows: bool
) -> None:
    calls: list[dict[str, Any]] = []

    def pick(_: Device, **how: Any) -> KernelChoice:
        calls.append(how)
        return KernelChoice(EagerKernels())

    monkeypatch.setattr(Device, "pick_kernels", pick)
    plan = plan_modes(config, fingerprint_model(config))[1]
    assert plan.recipe is not None
    recipe = replace(plan.recipe, weight_policy=POLICIES[policy])
    choose_kernels([replace(plan, recipe=recipe)], device)
    assert [how["per_row_scales"] for how in calls] == [rows]


@pytest.mark.parametrize("modes", [slice(0, 1), slice(1, 2), slice(0, 2)])
def test_the_transformer_comes_first_unless_it_is_waited_for(
    config: WorkerConfig, device: Device, modes: slice, monkeypatch
) -> None:
    chosen = config.model_copy(update={"modes": config.modes[modes]})
    plans = plan_modes(chosen, fingerprint_model(config))
    calls: list[str] = []
    build = loader._build_modes

    class RecordingLoader(ComponentLoader):
        def __init__(self, *args: Any) -> None:
            calls.append("components")
            super().__init__(*args)

    def build_modes(*args: Any) -> Any:
        calls.append("transformer")
        return build(*args)

    monkeypatch.setattr(loader, "ComponentLoader", RecordingLoader)
    monkeypatch.setattr(loader, "_build_modes", build_modes)
    load_model(config.model.path, plans, device)
    quantizes = any(mode.scales is not None for mode in chosen.modes)
    assert calls == sorted(["transformer", "components"], reverse=not quantizes)


@pytest.mark.parametrize("name", ["config.json", "diffusion_pytorch_model.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "cut", "a list"])
def test_a_damaged_transformer_is_named(
    folder: Path, config: WorkerConfig, device: Device, name: str, damage: str
) -> None:
    do_damage(folder / "transformer" / name, damage)
    model = config.model.model_copy(update={"path": folder})
    bf16 = config.model_copy(update={"model": model, "modes": config.modes[:1]})
    with pytest.raises((ModelUnusable, QuantError)) as caught:
        load_engine(bf16, device)
    assert "transformer/" in str(caught.value)
    assert names_file_and_fault(str(caught.value), folder / "transformer" / name, damage)


@pytest.mark.parametrize("name", ["transformer", "text_encoder", "vae"])
def test_a_cut_model_is_not_another_model(
    folder: Path, config: WorkerConfig, device: Device, name: str
) -> None:
    """As another model, it would be refused with the advice to make new scales."""
    file = next((folder / name).glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-10])
    model = config.model.model_copy(update={"path": folder})
    with pytest.raises(QuantError, match=rf"{file} ends after .* within tensor .* was cut"):
        load_engine(config.model_copy(update={"model": model}), device)


def do_damage(path: Path, damage: str) -> None:
    match damage:
        case "missing":
            path.unlink()
        case "cut":
            path.write_bytes(path.read_bytes()[:100])
        case _:
            path.write_text("[]", encoding="utf-8")


def names_file_and_fault(message: str, path: Path, damage: str) -> bool:
    """Whether a message is one line that names the file and does not mention downloads."""
    named = "lacks" in message if damage == "missing" else str(path) in message
    return named and "huggingface" not in message and "\n" not in message


def test_modes_that_differ_only_in_their_step_cache_share_a_transformer(
    config: WorkerConfig, scales: Scales, device: Device
) -> None:
    cache = FirstBlockCache(method="first_block", threshold=0.1)
    cached = tuple(
        mode.model_copy(update={"name": f"{mode.name}-cached", "step_cache": cache})
        for mode in config.modes
    )
    four = config.model_copy(update={"modes": (*config.modes, *cached)})
    modes = load_modes(config.model.path, plan_modes(four, scales.model_fingerprint), device)
    assert [mode.offer.name for mode in modes] == ["bf16", "w8a8", "bf16-cached", "w8a8-cached"]
    assert [mode.step_cache for mode in modes] == [None, None, cache, cache]
    bf16, w8a8, *others = (mode.transformer for mode in modes)
    assert others == [bf16, w8a8]
    assert bf16 is not w8a8


def test_quantized_blocks_get_the_attention_of_their_recipe(
    fp8_config: WorkerConfig, scales: Scales, device: Device
) -> None:
    plans = plan_modes(fp8_config, scales.model_fingerprint)
    (mode,) = load_modes(fp8_config.model.path, plans, device)
    blocks = mode.transformer.blocks
    assert [i for i, block in enumerate(blocks) if block.attention_scales] == list(range(2, 37))
    assert blocks[2].attention_scales == AttentionScales(1, 1, 1)


def test_kernels_that_do_not_run_are_logged_once_and_offered_with_their_warning(
    config: WorkerConfig, scales: Scales, device: Device, monkeypatch, caplog
) -> None:
    warning = "The kernels for Some Device do not run; plain torch runs instead."
    monkeypatch.setattr(
        Device, "pick_kernels", lambda _self, **how: KernelChoice(EagerKernels(), warning)
    )
    with caplog.at_level("WARNING"):
        plans = plan_modes(config, scales.model_fingerprint)
        modes = load_modes(config.model.path, plans, device)
    assert [record.getMessage() for record in caplog.records] == [f"bf16, w8a8: {warning}"]
    assert [(mode.offer.kernels, mode.offer.warning) for mode in modes] == [("eager", warning)] * 2


class FastKernels(EagerKernels):
    """Plain torch under the name of a device's own kernels."""

    name = "cuda"


def test_blocks_that_run_in_plain_torch_beside_fast_ones_are_logged(
    config: WorkerConfig, scales: Scales, device: Device, tmp_path: Path, monkeypatch, caplog
) -> None:
    text = (ROOT / "quant" / "recipe" / "presets" / "boundary-hif8.toml").read_text(
        encoding="utf-8"
    )
    before, _, acts = text.partition("[act]")
    file = tmp_path / "per-token.toml"
    file.write_text(f"{before}[act]{acts.replace('per_tensor', 'per_token', 1)}", encoding="utf-8")
    recipe = QuantRecipe.load(file)
    save_scales(replace(scales, recipe=recipe, act_scale={}), tmp_path / "scales.safetensors")
    mode = config.modes[1].model_copy(
        update={"recipe": str(file), "scales": tmp_path / "scales.safetensors"}
    )
    alone = config.model_copy(update={"modes": (mode,)})
    attention = "FlashAttention-3 does not run; torch's attention runs instead."
    monkeypatch.setattr(
        Device, "pick_kernels", lambda _self, **how: KernelChoice(FastKernels(), attention)
    )
    plans = plan_modes(alone, scales.model_fingerprint)
    (loaded,) = load_modes(config.model.path, plans, device)
    logged = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert logged[0] == f"w8a8: {attention}"
    assert logged[1].startswith("w8a8: 35 of 40 blocks run in plain torch")
    blocks = logged[1].removeprefix("w8a8: ")
    assert loaded.offer.warning == f"{attention} {blocks}", "one does not replace the other"


def test_fp8_attention_is_refused_where_no_kernels_run_it(
    fp8_config: WorkerConfig, scales: Scales
) -> None:
    plans = plan_modes(fp8_config, scales.model_fingerprint)
    with pytest.raises(ModelUnusable, match=r"FP8 attention, which Ascend 910B does not run"):
        load_modes(fp8_config.model.path, plans, Device("npu", "Ascend 910B"))
