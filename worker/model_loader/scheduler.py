"""Read a model's scheduler, set a mode's and its shift, and refuse what cannot denoise this model.

Wan2.1 predicts flows: the direction from the picture to the noise. Many schedulers of diffusers
are made for other predictions. Some of them fail in the pipeline, others run and leave noise. So
each configured schedule is tried with a perfect model of one small picture, without any weights.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, cast

import diffusers
import torch
from diffusers import SchedulerMixin

from worker.config import ModeConfig, ModelConfig, ModeShift, SchedulerName
from worker.errors import ModelUnusable
from worker.model_loader.component_files import CONFIG, load_component, read_json
from worker.model_loader.euler import EvenFlowEuler
from worker.model_loader.unipc import HostUniPC

SHIFTS: Final = ("flow_shift", "shift")
"""The names that schedulers have for the shift of their noise levels towards noise."""

NO_SHIFT: Final = 1.0
"""The shift that changes nothing."""

TIMESTEPS: Final = 1000
"""Wan's transformer takes its noise level, 0 to 1, times this."""

TIMESTEP_TOLERANCE: Final = 1.5
"""Some schedulers round timesteps down to whole numbers, from levels that are not exactly 1."""

_OWN: Final = {"UniPCMultistepScheduler": HostUniPC, "EvenFlowEuler": EvenFlowEuler}
_MODE_KEYS: Final = ("scheduler", "flow_shift", "min_steps", "default_steps")
"""What a mode may set that decides whether it can denoise."""
_OF_MODES: Final[dict[SchedulerName, str]] = {"euler": "EvenFlowEuler"}

NOISE_LEFT: Final = 0.1
"""The share of the noise that a schedule may leave of a perfectly predicted picture. Schedulers for
flows leave less than 0.001 of it, except DEIS: 0.05 in 20 steps, and all of it in one."""


def read_scheduler(folder: Path) -> Any:
    """Read the scheduler of the model in `folder`, of the class that its index names.

    Raises:
        ModelUnusable: it cannot be read, or the index names something else than a scheduler.
    """
    name = read_json(folder / "model_index.json")["scheduler"][1]
    kind: Any = getattr(diffusers, str(name), None)
    if not (isinstance(kind, type) and issubclass(kind, SchedulerMixin)):
        raise ModelUnusable(
            f"{folder / 'model_index.json'} names {name!r}, which is no scheduler that diffusers "
            "can run here: name another one."
        )
    return load_component(cast("Any", kind).from_pretrained, folder / "scheduler", CONFIG)


def mode_scheduler(own: Any, name: SchedulerName | None) -> Any:
    """Return the template for a mode: the model's own, or another with the shift of its own.

    Args:
        own: the model's scheduler.
        name: what the mode has in its place.
    """
    if name is None:
        return own
    shift = own.config.get(str(_shift_name(own)), NO_SHIFT)
    return make_scheduler(_OF_MODES[name], {}, shift=shift)


def shift_for(size: str, of_mode: ModeShift | None, of_model: Mapping[str, float]) -> float | None:
    """Return the configured shift of a size, first the mode's; None for the scheduler's own."""
    own = of_mode.get(size) if isinstance(of_mode, dict) else of_mode
    return of_model.get(size) if own is None else own


def scheduler_for_run(template: Any, shift: float | None) -> Any:
    """Create a scheduler for one run: it has state, which a cancelled run leaves incomplete.

    Args:
        shift: None for the model's own. `check_scheduler` has checked that the class has one.
    """
    name, changes = scheduler_name(template), {}
    if shift is not None:
        shift_name = _shift_name(template)
        assert shift_name is not None, "check_scheduler refuses a shift that the scheduler lacks"
        changes[shift_name] = shift
    return make_scheduler(name, template.config, **changes)


def make_scheduler(name: str, config: Any, **changes: float) -> Any:
    """Create a scheduler of a class of diffusers, or the one of our own that stands for it.

    Args:
        config: of the scheduler; `changes` replace some of its settings.
    """
    kind: Any = _OWN.get(name) or getattr(diffusers, name)
    return kind.from_config(config, **changes)


def scheduler_name(scheduler: Any) -> str:
    """Return the name by which `make_scheduler` makes another scheduler like this one."""
    kind = type(scheduler)
    return next((name for name, own in _OWN.items() if own is kind), kind.__name__)


def check_scheduler(model: ModelConfig, modes: Sequence[ModeConfig] = ()) -> None:
    """Refuse a scheduler that cannot denoise flows, or that ignores a configured shift.

    Raises:
        ModelUnusable: names the scheduler's class, what it does instead, and the mode.
    """
    template = read_scheduler(model.path)
    offer = model.offer(fingerprint="unread")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the libraries' own, about each other
        for size, shift in model.flow_shift.items():
            _check_shift(template, shift, f"[model.flow_shift] for {size}", model)
        for each in {None, *model.flow_shift.values()}:
            for steps in sorted({1, model.default_steps}):
                _check_run(template, each, steps, model)
        own = template.config.get(str(_shift_name(template)), NO_SHIFT)
        if own != NO_SHIFT:
            _check_shift(template, own, "scheduler/scheduler_config.json", model)
        for mode in modes:
            terms, of_mode = offer.terms(mode), mode_scheduler(template, mode.scheduler)
            shifts = {shift_for(size, mode.flow_shift, model.flow_shift) for size in model.sizes}
            for each in shifts:
                if each is not None and mode.flow_shift is not None:
                    _check_shift(of_mode, each, f"flow_shift of mode {mode.name!r}", model, mode)
                for steps in sorted({1, terms.min_steps, terms.default_steps}):
                    _check_run(of_mode, each, steps, model, mode)


def _check_run(
    template: Any,
    shift: float | None,
    steps: int,
    model: ModelConfig,
    mode: ModeConfig | None = None,
) -> None:
    """Refuse a scheduler that leaves noise.

    Args:
        mode: whose settings are the cause, as the model without them has been tried before.
    """
    fault = _fault(scheduler_for_run(template, shift), steps)
    if fault is None:
        return
    where, remedy = "", "name one in model_index.json and scheduler/scheduler_config.json that can"
    remedy += ", as the model's authors do"
    if mode is not None:
        keys = [key for key in _MODE_KEYS if getattr(mode, key) is not None]
        where, remedy = f" in mode {mode.name!r}", f"change {' or '.join(keys)} of that mode"
    raise ModelUnusable(
        f"The scheduler {_describe(template, shift)} of {_owner(model, mode)} cannot denoise this "
        f"model, which predicts flows: {fault} in a run of {steps} step{'s' * (steps > 1)}"
        f"{where}; {remedy}."
    )


def _owner(model: ModelConfig, mode: ModeConfig | None) -> str:
    """Name who has chosen a scheduler."""
    if mode is None or mode.scheduler is None:
        return str(model.path)
    return f"mode {mode.name!r}"


def _check_shift(
    template: Any, shift: float, where: str, model: ModelConfig, mode: ModeConfig | None = None
) -> None:
    """Refuse a shift that changes nothing; `where` says where it is configured."""
    name, does = _shift_name(template), None
    if name is None:
        does = "has no shift"
    elif _has_no_effect(template, shift, max(2, model.default_steps)):
        does = f"ignores its {name}, because of the other settings in its file"
    if does is not None:
        raise ModelUnusable(
            f"{where} sets a shift of {shift:g}, but the scheduler {type(template).__name__} of "
            f"{_owner(model, mode)} {does}: take it out, or give "
            f"{'the model' if mode is None else 'that mode'} another scheduler."
        )


def _shift_name(template: Any) -> str | None:
    return next((name for name in SHIFTS if name in template.config), None)


def _has_no_effect(template: Any, shift: float, steps: int) -> bool:
    """Return whether the noise levels are the same with another shift."""
    levels = []
    for each in (shift, 2 * shift):
        scheduler = scheduler_for_run(template, each)
        try:
            scheduler.set_timesteps(steps, device="cpu")
            levels.append(torch.as_tensor(scheduler.sigmas))
        except Exception:  # noqa: BLE001  # a library's own, of any kind: `_fault` reports it
            return False
    return torch.equal(*levels)


def _describe(template: Any, shift: float | None) -> str:
    """Name a scheduler with those of its settings that decide what it can denoise."""
    kind, config = type(template).__name__, template.config
    names = ("prediction_type", "use_flow_sigmas", "num_train_timesteps")
    settings = [f"{name} {config[name]!r}" for name in names if name in config]
    if shift is not None:
        settings.append(f"{_shift_name(template)} {shift:g}")
    return f"{kind} ({', '.join(settings)})" if settings else kind


def _fault(scheduler: Any, steps: int) -> str | None:
    """Run a scheduler as `WanPipeline` does; return what is wrong with it, if anything is."""
    random_state = torch.get_rng_state()
    try:
        levels, left = _denoise_perfectly(scheduler, steps)
    except Exception as error:  # noqa: BLE001  # a library's own, of any kind
        return f"it fails with {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    finally:
        drew = not torch.equal(random_state, torch.get_rng_state())
        torch.set_rng_state(random_state)
    count = len(scheduler.timesteps)
    if count != steps:
        return f"it runs the model {count} times"
    expected = TIMESTEPS * torch.tensor(levels)
    if not (scheduler.timesteps.cpu() - expected).abs().max() <= TIMESTEP_TOLERANCE:
        return f"its timesteps are not its noise levels, 1 to 0, times {TIMESTEPS}"
    if not left <= NOISE_LEFT:
        gives = f"leaves {left:.0%} of the noise" if math.isfinite(left) else "gives NaN"
        return f"even a perfect model {gives}"
    if drew:
        return "it draws noise of its own, so the same seed would give different videos"
    return None


def _denoise_perfectly(scheduler: Any, steps: int) -> tuple[list[float], float]:
    """Denoise with a model that knows the picture; return noise levels and the noise's share left.

    The calls are those of `WanPipeline`. The share is NaN if the result is not finite.
    """
    random = torch.Generator().manual_seed(0)
    picture, noise = torch.randn(2, 1, 1, 1, 4, 4, generator=random)
    scheduler.set_timesteps(steps, device="cpu")
    scheduler.set_begin_index(0)
    sample, levels = noise, []
    for index, timestep in enumerate(scheduler.timesteps):
        levels.append(float(scheduler.sigmas[index]))
        flow = (sample - picture) / levels[-1]
        sample = scheduler.step(flow, timestep, sample, return_dict=False)[0]
    left = (sample - picture).norm() / (noise - picture).norm()
    return levels, float(left) if math.isfinite(left) else math.nan
