"""Modes with LoRAs beside others, on a tiny model: their weights, what they share, and jobs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel
from redis import Redis
from safetensors.torch import save_file
from torch import Tensor, nn

import quant
from jobs import catalog
from jobs.artifacts.folder import FolderArtifactStore
from jobs.state import JobState
from jobs.store.job_store import JobStore
from quant.calibration.sampling import load_pipeline
from quant.kernels.eager import EagerKernels
from tests.quant.conftest import PROMPTS, save_tiny_model, tiny_recipe_dict
from tests.support.job_controls import IgnoringControl
from tests.support.requests import OWNER, generation_request
from worker.config import WorkerConfig, load_config
from worker.consumer.rq_worker import ResidentWorker
from worker.device import Device
from worker.engine.wan_engine import WanEngine
from worker.errors import ConfigError
from worker.model_loader.loader import Mode, load_modes
from worker.model_loader.memory_plan import measure_model
from worker.model_loader.mode_plan import ModePlan, fingerprint_model, plan_modes
from worker.model_loader.plan_table import configured_cases
from worker.startup import load_engine

MODEL = """
[model]
name = "tiny"
path = "tiny"
sizes = ["32x32"]
default_size = "32x32"
min_frames = 1
max_frames = 5
default_frames = 5
fps = 8
max_steps = 4
default_steps = 1
default_guidance_scale = 3.0
default_mode = "{default}"
max_prompt_chars = 100
text_tokens = 16
"""
LORA = 'lora = [{ path = "lora.safetensors", scale = 0.5 }, { path = "second.safetensors" }]\n'
RECIPE = 'recipe = "recipe.json"\n'
MODES = {
    "bf16": "",
    "w8a8": f'{RECIPE}scales = "plain.safetensors"\n',
    "fast": LORA,
    "fast-w8a8": f'{LORA}{RECIPE}scales = "fast.safetensors"\n',
    "packed": f'{RECIPE}packed = "packed-plain"\n',
    "fast-packed": f'{LORA}{RECIPE}packed = "packed-fast"\n',
    "other": 'lora = [{ path = "lora.safetensors", scale = 2.0 }]\n',
}
REQUEST = generation_request(
    model="tiny", prompt="a red a", size="32x32", num_frames=1, num_inference_steps=1
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, two LoRAs, and scales and packed checkpoints with and without them."""
    folder = tmp_path_factory.mktemp("loras")
    model = save_tiny_model(folder / "tiny")
    recipe = quant.QuantRecipe.from_dict(tiny_recipe_dict())
    (folder / "recipe.json").write_text(recipe.to_json())
    torch.manual_seed(2)
    blocks = "diffusion_model.blocks"
    tensors = {
        "diffusion_model.patch_embedding.diff_b": torch.randn(32),
        f"{blocks}.3.norm3.diff": torch.randn(32),
        f"{blocks}.2.ffn.0.diff_b": torch.randn(64),
        f"{blocks}.3.diff_m": torch.randn(1, 6, 32) / 4,
    }
    for module in ("0.self_attn.q", "1.self_attn.q", "1.cross_attn.o", "3.cross_attn.v"):
        tensors[f"{blocks}.{module}.lora_down.weight"] = torch.randn(2, 32) / 4
        tensors[f"{blocks}.{module}.lora_up.weight"] = torch.randn(32, 2) / 4
    save_file(tensors, folder / "lora.safetensors")
    save_file(
        {"transformer.proj_out.lora_A.weight": torch.randn(1, 32)}
        | {"transformer.proj_out.lora_B.weight": torch.randn(64, 1)},
        folder / "second.safetensors",
    )
    plan = quant.CalibrationPlan(
        model_fingerprint=quant.model_fingerprint(model),
        recipe=recipe,
        prompts=quant.PromptSet(PROMPTS[:8], "prompts.txt"),
        sampler=quant.SamplerSettings((32, 32), 1, 1, 3.0, 16, timestep_groups=1),
    )
    scales = quant.run_calibration(load_pipeline(model, "cpu"), plan)
    quant.save_scales(scales, folder / "plain.safetensors")
    loras = read_fast(folder)
    fast = replace(scales, model_fingerprint=loras.fingerprint(plan.model_fingerprint))
    quant.save_scales(fast, folder / "fast.safetensors")
    quant.convert(model, recipe, folder / "plain.safetensors", folder / "packed-plain")
    quant.convert(model, recipe, folder / "fast.safetensors", folder / "packed-fast", loras=loras)
    return folder


def read_fast(folder: Path) -> quant.LoraSet:
    """Read the LoRAs that `LORA` names."""
    files = (("lora.safetensors", 0.5), ("second.safetensors", 1.0))
    return quant.read_loras(
        folder / "tiny", [quant.LoraSource(folder / file, scale) for file, scale in files]
    )


def configured(folder: Path, *modes: str) -> WorkerConfig:
    text = MODEL.format(default=modes[0])
    for mode in modes:
        text += f'\n[[modes]]\nname = "{mode}"\ndescription = "d"\n{MODES[mode]}'
    (folder / "worker.toml").write_text(text)
    return load_config(folder / "worker.toml")


def loaded(config: WorkerConfig, device: Device) -> tuple[list[ModePlan], tuple[Mode, ...]]:
    plans = plan_modes(config, fingerprint_model(config))
    return plans, load_modes(config.model.path, plans, device)


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, Mapping[str, Tensor]]:
    """The tensors of each mode, made without the loader."""
    recipe = quant.QuantRecipe.load(str(folder / "recipe.json"))
    scales = quant.load_scales(folder / "plain.safetensors")
    source = quant.LoraSource(folder / "lora.safetensors", 2.0)
    found: dict[str, Mapping[str, Tensor]] = {}
    for name, loras in (
        ("bf16", quant.LoraSet()),
        ("fast", read_fast(folder)),
        ("other", quant.read_loras(folder / "tiny", [source])),
    ):
        bf16: nn.Module = WanTransformer3DModel.from_pretrained(
            folder / "tiny" / "transformer", torch_dtype=torch.bfloat16
        ).eval()
        loras.merge(bf16)
        quantized, _ = quant.quantize_transformer(bf16, recipe, scales)
        quant.fuse_quantized(quantized, EagerKernels(), {})
        quant.fuse_quantized(bf16, EagerKernels(), {})
        found[name] = bf16.state_dict()
        for other in {"bf16": ("w8a8", "packed"), "fast": ("fast-w8a8", "fast-packed")}.get(
            name, ()
        ):
            found[other] = quantized.state_dict()
    return found


@pytest.mark.parametrize(
    "modes",
    [
        ("fast",),
        ("fast-w8a8",),
        ("fast-packed",),
        ("fast", "fast-w8a8"),
        ("fast", "fast-packed"),
        ("bf16", "fast"),
        ("fast", "other"),
        ("bf16", "w8a8", "fast", "fast-w8a8"),
        ("bf16", "packed", "fast", "fast-packed"),
        ("bf16", "fast-packed"),
        ("packed", "fast-packed"),
        ("packed", "fast-packed", "other"),
        ("w8a8", "fast-w8a8"),
    ],
    ids="+".join,
)
def test_modes_have_their_weights_and_share_what_no_lora_changes(
    folder: Path,
    expected: dict[str, Mapping[str, Tensor]],
    device: Device,
    modes: tuple[str, ...],
) -> None:
    config = configured(folder, *modes)
    plans, found = loaded(config, device)
    for mode in found:
        state = mode.transformer.state_dict()
        reference = expected[mode.offer.name]
        assert state.keys() == reference.keys()
        for name, tensor in state.items():
            assert torch.equal(tensor, reference[name]), f"{name} of {mode.offer.name}"
    recipes, loras = [plan.recipe for plan in plans], [plan.loras for plan in plans]
    planned = measure_model(config, recipes, device, loras=loras)
    taken = quant.weight_bytes(*(mode.transformer for mode in found))
    assert planned.transformer == taken
    assert planned.transformer_loading >= taken


def test_a_second_mode_takes_only_what_its_loras_change(folder: Path, device: Device) -> None:
    (alone,) = loaded(configured(folder, "bf16"), device)[1]
    bf16, fast = loaded(configured(folder, "bf16", "fast"), device)[1]
    together = quant.weight_bytes(bf16.transformer, fast.transformer)
    state = WanTransformer3DModel.from_pretrained(folder / "tiny" / "transformer").state_dict()
    own = sum(
        state[name].numel() * (4 if "scale_shift_table" in name or ".norm2." in name else 2)
        for name in read_fast(folder).names
    )
    assert together == alone.weight_bytes + own
    (merged,) = loaded(configured(folder, "fast"), device)[1]
    assert merged.weight_bytes == alone.weight_bytes, "alone, it is merged in place"
    assert fast.conversion == (
        f"LoRAs in 9 tensors: {folder / 'lora.safetensors'}:0.5, {folder / 'second.safetensors'}"
    )


def test_packed_modes_need_no_other_transformer(
    folder: Path, device: Device, tmp_path: Path
) -> None:
    """The model's fingerprint is that without LoRAs, also if the first checkpoint has some."""
    config = configured(folder, "fast-packed", "packed")
    fingerprint = fingerprint_model(config)
    (weights,) = (folder / "tiny" / "transformer").glob("*.safetensors")
    weights.rename(tmp_path / "away")
    try:
        assert fingerprint_model(config) == fingerprint
        assert len(load_modes(config.model.path, plan_modes(config, fingerprint), device)) == 2
    finally:
        (tmp_path / "away").rename(weights)


@pytest.mark.parametrize(
    ("mode", "error", "command"),
    [
        ("w8a8", quant.ScalesMismatch, "calibrate"),
        ("packed", quant.PackedMismatch, "convert"),
    ],
)
def test_what_was_made_without_the_loras_is_refused(
    folder: Path, mode: str, error: type[Exception], command: str
) -> None:
    config = configured(folder, mode, "fast")
    plain, fast = config.modes
    wrong = config.model_copy(update={"modes": (plain.model_copy(update={"lora": fast.lora}),)})
    with pytest.raises(error, match=r"with no LoRA, and it has the LoRAs \w+ here") as caught:
        plan_modes(wrong, fingerprint_model(config))
    rest = str(caught.value).rpartition(f"-m quant {command} ")[2]
    assert f"--lora {folder / 'lora.safetensors'}:0.5 " in rest
    assert f"--lora {folder / 'second.safetensors'} " in rest


def test_loras_are_entries_with_a_path(folder: Path, tmp_path: Path) -> None:
    config = configured(folder, "fast")
    assert [(each.path, each.scale) for each in config.modes[0].lora] == [
        (folder / "lora.safetensors", 0.5),
        (folder / "second.safetensors", 1.0),
    ]
    (case,) = configured_cases(folder / "worker.toml")
    assert case.loras is not None
    assert case.loras[0].names
    text = (folder / "worker.toml").read_text()
    for wrong, said in (
        ('[{ path = "a", scale = inf }]', "lora.0.scale: Input should be a finite number"),
        ('[{ file = "a" }]', "lora.0.path: Field required"),
        ('"a"', "lora: Input should be a valid tuple"),
    ):
        (tmp_path / "worker.toml").write_text(text.replace(LORA, f"lora = {wrong}\n"))
        with pytest.raises(ConfigError, match=f"is wrong: modes.0.{said}"):
            load_config(tmp_path / "worker.toml")


def test_a_worker_serves_jobs_in_modes_with_and_without_loras(
    folder: Path, device: Device, redis: Redis, store: JobStore, tmp_path: Path
) -> None:
    engine = load_engine(configured(folder, "bf16", "fast", "fast-w8a8"), device)
    digest = read_fast(folder).digest
    assert digest is not None
    variant = f"lora:{digest[:12]}"
    assert [mode.variant for mode in engine.modes] == [None, variant, variant]
    assert engine.model.fingerprint == quant.model_fingerprint(folder / "tiny")
    assert "mode fast-w8a8: LoRAs in 9 tensors: " in "\n".join(engine.describe())
    queue = catalog.queue_name(engine.model, engine.modes)
    jobs = [
        store.create(REQUEST.model_copy(update={"mode": mode.name}), queue).job.id
        for mode in engine.modes
    ]
    artifacts = FolderArtifactStore(tmp_path / "artifacts")
    ResidentWorker(engine, redis, artifacts).work(burst=True, logging_level="WARNING")
    assert [store.get(job).state for job in jobs] == 3 * [JobState.SUCCEEDED]
    bf16, fast, quantized = (frames(engine, mode.name) for mode in engine.modes)
    assert not np.array_equal(bf16, fast)
    assert not np.array_equal(fast, quantized)


def frames(engine: WanEngine, mode: str) -> np.ndarray:
    request = REQUEST.model_copy(update={"mode": mode})
    return np.stack(list(engine.generate(request, IgnoringControl(), OWNER).frames))


def test_another_lora_is_another_offer(folder: Path, device: Device) -> None:
    """So that no job that was checked against one is run by a worker with the other."""
    (fast,), (other,) = (loaded(configured(folder, mode), device)[1] for mode in ("fast", "other"))
    model = configured(folder, "bf16").model.offer("fingerprint")
    offers = [mode.offer.model_copy(update={"name": "fast"}) for mode in (fast, other)]
    assert catalog.queue_name(model, offers[:1]) != catalog.queue_name(model, offers[1:])
    assert json.loads(offers[0].model_dump_json())["variant"] == fast.offer.variant
