"""Test a mode of few steps: Euler's method without guidance, beside a pipeline of diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from torch import Tensor

from jobs.errors import GenerationFailed
from jobs.record import JobRecord, now
from jobs.state import JobState
from tests.support.diffusers_reference import with_our_products
from tests.support.job_controls import RecordingControl
from tests.support.requests import OWNER, generation_request, unique_prompt
from worker.config import load_config
from worker.device import Device
from worker.engine.wan_engine import WanEngine
from worker.job.generation import video_metadata
from worker.startup import load_engine

FAST = """
[[modes]]
name = "fast"
description = "Four steps without guidance."
scheduler = "euler"
flow_shift = 5.0
default_steps = 4
max_steps = 8
default_guidance_scale = 1.0
max_guidance_scale = 1.0
"""
SHORT: dict[str, Any] = {"mode": "fast", "num_frames": 5, "guidance_scale": 1.0}


class EvenlySpaced(FlowMatchEulerDiscreteScheduler):  # type: ignore[misc]  # untyped to mypy here
    """diffusers' Euler with the levels that its pipelines of other flow models pass to it."""

    def set_timesteps(self, num_inference_steps: int, device: object = None) -> None:
        levels = [1 - step / num_inference_steps for step in range(num_inference_steps)]
        super().set_timesteps(sigmas=levels, device=device)


@pytest.fixture(scope="module")
def fast(config_file: Path, tmp_path_factory: pytest.TempPathFactory, device: Device) -> WanEngine:
    """The miniature in BF16 and in a mode of few steps."""
    text = config_file.read_text(encoding="utf-8").replace('"w8a8"\nmax', '"bf16"\nmax')
    bf16, _, _ = text.partition('[[modes]]\nname = "w8a8"')
    path = tmp_path_factory.mktemp("fast") / "worker.toml"
    path.write_text(bf16 + FAST, encoding="utf-8")
    return load_engine(load_config(path), device)


def count_calls(module: torch.nn.Module, counts: dict[str, int], name: str) -> Any:
    def count(*_: object) -> None:
        counts[name] = counts.get(name, 0) + 1

    return module.register_forward_hook(count)


def test_it_is_diffusers_own_pipeline_to_the_last_bit(
    fast: WanEngine, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Tensor] = []
    denoise = fast._denoise

    def keep(*arguments: Any) -> Tensor:
        kept.append(denoise(*arguments))
        return kept[0]

    monkeypatch.setattr(fast, "_denoise", keep)
    counts: dict[str, int] = {}
    hooks = [
        count_calls(fast.loaded["fast"].transformer, counts, "passes"),
        count_calls(fast.components.text_encoder, counts, "texts"),
    ]
    request = generation_request(**SHORT, prompt=unique_prompt(), negative_prompt="grey")
    fast.generate(request, RecordingControl(), OWNER)
    for hook in hooks:
        hook.remove()
    assert counts == {"passes": 4, "texts": 1}, "nothing is computed for the negative prompt"

    pipeline = WanPipeline.from_pretrained(
        model_folder, scheduler=EvenlySpaced(shift=5.0), dtype=torch.bfloat16
    )
    pipeline.set_progress_bar_config(disable=True)
    with_our_products(pipeline.transformer)
    arguments = {
        "prompt": request.prompt,
        "width": 96,
        "height": 96,
        "num_frames": 5,
        "num_inference_steps": 4,
        "guidance_scale": 1.0,
        "max_sequence_length": 64,
    }
    seeded = torch.Generator().manual_seed(7)
    latents = pipeline(**arguments, generator=seeded, output_type="latent").frames
    assert torch.equal(kept[0], latents)


def test_previews_show_what_the_model_predicts(fast: WanEngine) -> None:
    """After one of four steps at this shift, latents are nearly all noise."""
    seen: dict[int, Tensor] = {}

    class Keeping(RecordingControl):
        def preview(self, step: int, steps: int, make: Any) -> None:
            seen[step] = make.args[0]

    fast.generate(generation_request(**SHORT), Keeping(), OWNER)
    assert sorted(seen) == [1, 2, 3, 4]
    off = [
        float((seen[step] - seen[4]).float().std() / seen[4].float().std()) for step in (1, 2, 3)
    ]
    assert off == sorted(off, reverse=True)
    assert off[0] < 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_inference_steps": 9}, "takes 1 to 8 steps and at most guidance 1, not 9 steps"),
        ({"guidance_scale": 4.0}, "not 4 steps with guidance 4"),
    ],
)
def test_a_request_out_of_the_modes_bounds_is_refused(
    fast: WanEngine, changes: dict[str, object], message: str
) -> None:
    """A service of before the mode had bounds does not know them."""
    request = generation_request(**SHORT | changes)
    with pytest.raises(GenerationFailed, match=message):
        fast.generate(request, RecordingControl(), OWNER)


def test_both_modes_share_one_transformer_and_say_what_they_are(fast: WanEngine) -> None:
    modes = fast.loaded
    assert modes["fast"].transformer is modes["bf16"].transformer
    usual, own = fast.modes
    assert (usual.own, usual.variant) == ({}, None)
    assert own.own["max_guidance_scale"] == 1.0
    log = "\n".join(fast.describe())
    assert "mode fast: 4 steps (1 to 8), guidance 1 (at most 1), scheduler euler, " in log
    assert "flow shift 5" in log
    assert "mode bf16: 20 steps" not in log
    record = JobRecord(
        id="0" * 32,
        state=JobState.RUNNING,
        request=generation_request(**SHORT),
        queue="q",
        owner=OWNER,
        deadline_s=60,
        created_at=now(),
    )
    metadata = video_metadata(fast, record)
    assert metadata["variant"] == "scheduler:euler+flow_shift:5"
    assert (metadata["num_inference_steps"], metadata["guidance_scale"]) == (4, 1.0)
