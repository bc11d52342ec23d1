"""Test which schedulers are refused before anything is loaded, and that a shift takes effect."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

from worker.device import Device
from worker.errors import ModelUnusable
from worker.model_loader.scheduler import check_scheduler, read_scheduler, scheduler_for_run
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


def test_a_worker_does_not_start_with_another_scheduler(edited, device: Device) -> None:
    edited.set_scheduler("DDIMScheduler")
    with pytest.raises(ModelUnusable, match="DDIMScheduler"):
        load_engine(edited.with_modes("bf16"), device)
