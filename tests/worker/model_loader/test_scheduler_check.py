"""Test which schedulers are refused before anything is loaded, and that a shift takes effect."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

from worker.config import WorkerConfig
from worker.device import Device
from worker.errors import ModelUnusable
from worker.model_loader.scheduler import (
    check_scheduler,
    make_scheduler,
    mode_scheduler,
    read_scheduler,
    scheduler_for_run,
    scheduler_name,
    shift_for,
)
from worker.startup import load_engine

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
UNIPC = "UniPCMultistepScheduler"
EULER = "FlowMatchEulerDiscreteScheduler"
SHIFTED = {"flow_shift": {"96x96": 9.0}}

DRIVEN: list[tuple[str, dict[str, Any]]] = [
    (UNIPC, FLOW | {"flow_shift": 3.0}),
    (UNIPC, FLOW | {"solver_order": 3, "solver_p": None}),
    (EULER, {"shift": 3.0}),
    (EULER, {}),
    ("DPMSolverMultistepScheduler", FLOW | {"flow_shift": 5.0}),
    ("DPMSolverSinglestepScheduler", FLOW | {"flow_shift": 5.0}),
]

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("DDIMScheduler", {}, r"DDIMScheduler .*'epsilon'.* fails with AttributeError: .*begin_index"),
    ("DDPMScheduler", FLOW, r"DDPMScheduler .* fails with AttributeError"),
    ("LCMScheduler", {}, r"LCMScheduler .* fails with AttributeError"),
    ("EulerDiscreteScheduler", {}, r"EulerDiscreteScheduler .* timesteps are not its noise"),
    (UNIPC, {}, r"UniPC.*prediction_type 'epsilon', use_flow_sigmas False.* timesteps are not"),
    (UNIPC, FLOW | {"prediction_type": "v_prediction"}, r"'v_prediction'.* leaves \d+% of the"),
    (UNIPC, FLOW | {"prediction_type": "sample"}, r"'sample'.* leaves .* of the noise"),
    (UNIPC, FLOW | {"solver_type": "bh1"}, r"UniPC.* even a perfect model gives NaN in a run"),
    (
        UNIPC,
        FLOW | {"use_karras_sigmas": True, "flow_shift": 3.0},
        r"scheduler_config.json sets a shift of 3, but the scheduler UniPC.* ignores its flow_sh",
    ),
    (UNIPC, FLOW | {"use_dynamic_shifting": True}, r"UniPC.* fails with"),
    (UNIPC, FLOW | {"final_sigmas_type": "sigma_min"}, r"100% of the noise in a run of 1 step;"),
    (UNIPC, FLOW | {"num_train_timesteps": 10}, r"num_train_timesteps 10.* timesteps are not"),
    (EULER, {"num_train_timesteps": 10}, r"num_train_timesteps 10.* timesteps are not"),
    (EULER, {"invert_sigmas": True}, r"FlowMatchEuler"),
    (EULER, {"use_dynamic_shifting": True}, r"FlowMatchEuler.* fails with ValueError"),
    (EULER, {"stochastic_sampling": True}, r"FlowMatchEuler.* draws noise of its own"),
    ("FlowMatchHeunDiscreteScheduler", {}, r"runs the model 39 times in .* 20 steps"),
    ("FlowMatchLCMScheduler", {}, r"FlowMatchLCMScheduler .* draws noise of its own"),
    ("DEISMultistepScheduler", FLOW, r"DEIS.* of the noise in a run of 1 step;"),
    ("DPMSolverSDEScheduler", {}, r"names 'DPMSolverSDEScheduler', which is no scheduler"),
    ("AutoencoderKL", {}, r"names 'AutoencoderKL', which is no scheduler"),
]


def test_noise_levels_without_a_shift_need_none(edited) -> None:
    edited.set_scheduler(UNIPC, **FLOW, use_karras_sigmas=True)
    check_scheduler(edited.config.model)


@pytest.mark.parametrize(("name", "settings"), DRIVEN)
@pytest.mark.parametrize("model", [{}, SHIFTED])
def test_schedulers_of_flows_are_accepted(
    edited, name: str, settings: dict[str, Any], model: dict[str, Any]
) -> None:
    edited.set_scheduler(name, **settings)
    random_state = torch.get_rng_state()
    check_scheduler(edited.with_model(**model).model)
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize(("name", "settings", "message"), REFUSED)
def test_other_schedulers_are_refused_by_name_with_the_reason(
    edited, name: str, settings: dict[str, Any], message: str
) -> None:
    edited.set_scheduler(name, **settings)
    random_state = torch.get_rng_state()
    with pytest.raises(ModelUnusable, match=message) as caught:
        check_scheduler(edited.config.model)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        (
            "DDIMScheduler",
            {},
            r"for 96x96 sets a shift of 9, but the scheduler DDIM.* has no shift",
        ),
        (UNIPC, FLOW | {"use_karras_sigmas": True}, r"UniPCMultistepScheduler .* ignores its flow"),
        (UNIPC, {}, r"UniPCMultistepScheduler .* ignores its flow_shift"),
    ],
)
def test_a_shift_that_would_be_ignored_is_refused(
    edited, name: str, settings: dict[str, Any], message: str
) -> None:
    edited.set_scheduler(name, **settings)
    with pytest.raises(ModelUnusable, match=message):
        check_scheduler(edited.with_model(**SHIFTED).model)


@pytest.mark.parametrize(("name", "settings"), [(UNIPC, FLOW), (EULER, {}), (EULER, {"shift": 3})])
def test_a_shift_is_set_under_the_scheduler_s_own_name(
    edited, name: str, settings: dict[str, Any]
) -> None:
    edited.set_scheduler(name, **settings)
    template = read_scheduler(edited.folder)
    shifted = settings | {"flow_shift" if name == UNIPC else "shift": 9.0}
    expected, own, with_shift = (
        getattr(diffusers, name)(**shifted),
        scheduler_for_run(template, None),
        scheduler_for_run(template, 9.0),
    )
    for scheduler in (expected, own, with_shift):
        scheduler.set_timesteps(4)
    assert torch.equal(with_shift.sigmas, expected.sigmas)
    assert not torch.equal(own.sigmas, expected.sigmas)


def with_mode(edited, **changes: object) -> WorkerConfig:
    """The configuration with a mode of few steps."""
    mode = edited.config.modes[0].model_copy(update={"name": "fast", "default_steps": 4} | changes)
    return edited.config.model_copy(update={"modes": (*edited.config.modes, mode)})


def test_a_mode_may_have_a_scheduler_and_a_shift_of_its_own(edited) -> None:
    changes: list[dict[str, object]] = [
        {"flow_shift": 5.0},
        {"flow_shift": {"96x96": 5.0}, "scheduler": "euler"},
        {"scheduler": "euler"},
    ]
    for each in changes:
        config = with_mode(edited, **each)
        check_scheduler(config.model, config.modes)
    edited.set_scheduler(UNIPC, **FLOW, use_karras_sigmas=True)
    config = with_mode(edited, flow_shift=5.0, scheduler="euler")
    check_scheduler(config.model, config.modes)


@pytest.mark.parametrize("flow_shift", [5.0, {"96x96": 5.0}])
def test_a_shift_of_a_mode_that_would_be_ignored_is_refused(edited, flow_shift: object) -> None:
    edited.set_scheduler(UNIPC, **FLOW, use_karras_sigmas=True)
    config = with_mode(edited, flow_shift=flow_shift)
    with pytest.raises(
        ModelUnusable,
        match=r"flow_shift of mode 'fast' sets a shift of 5, .*UniPC.*give that mode another sch",
    ):
        check_scheduler(config.model, config.modes)


def test_a_mode_that_cannot_denoise_is_named(edited) -> None:
    """Only in its own steps, and not in one or in the model's."""
    edited.set_scheduler("DPMSolverSinglestepScheduler", **FLOW, flow_shift=3.0)
    config = with_mode(edited, flow_shift=1e5)
    with pytest.raises(
        ModelUnusable,
        match=rf"DPM.* of {edited.folder} .* NaN in a run of 4 steps in mode 'fast'; "
        r"change flow_shift or default_steps of that mode\.$",
    ):
        check_scheduler(config.model, config.modes)


def test_a_mode_with_a_scheduler_of_its_own_is_told_of_its_own_keys(edited) -> None:
    config = with_mode(edited, flow_shift=1e-9, scheduler="euler")
    with pytest.raises(
        ModelUnusable,
        match=r"The scheduler EvenFlowEuler .* of mode 'fast' .* in mode 'fast'; "
        r"change scheduler or flow_shift or default_steps of that mode\.$",
    ):
        check_scheduler(config.model, config.modes)


@pytest.mark.parametrize(
    ("shift", "levels"), [(1.0, [1, 0.75, 0.5, 0.25, 0]), (5.0, [1, 15 / 16, 5 / 6, 5 / 8, 0])]
)
def test_euler_has_the_levels_that_models_are_distilled_to(
    edited, shift: float, levels: list[float]
) -> None:
    own = read_scheduler(edited.folder)
    scheduler = scheduler_for_run(mode_scheduler(own, "euler"), shift)
    scheduler.set_timesteps(4, device="cpu")
    assert torch.allclose(scheduler.sigmas, torch.tensor(levels), atol=1e-6)
    assert torch.allclose(scheduler.timesteps, 1000 * torch.tensor(levels[:-1]), atol=1e-3)
    again = make_scheduler(scheduler_name(scheduler), dict(scheduler.config))  # as other ranks do
    again.set_timesteps(4, device="cpu")
    assert torch.equal(again.sigmas, scheduler.sigmas)


def test_euler_has_the_models_own_shift_where_none_is_set(edited) -> None:
    own = read_scheduler(edited.folder)
    scheduler = scheduler_for_run(mode_scheduler(own, "euler"), None)
    assert scheduler.shift == own.config.flow_shift == 3.0
    assert mode_scheduler(own, None) is own
    of_model = {"96x96": 9.0}
    assert shift_for("96x96", None, of_model) == 9.0
    assert shift_for("96x96", 5.0, of_model) == shift_for("96x96", {"96x96": 5.0}, {}) == 5.0
    assert shift_for("96x96", {"64x64": 5.0}, of_model) == 9.0
    assert shift_for("64x64", None, of_model) is None


def test_a_worker_does_not_start_with_another_scheduler(edited, device: Device) -> None:
    edited.set_scheduler("DDIMScheduler")
    with pytest.raises(ModelUnusable, match="DDIMScheduler"):
        load_engine(edited.with_modes("bf16"), device)
