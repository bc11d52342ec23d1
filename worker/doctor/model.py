"""Check configuration, model folder, scales and the plan of the memory, before weights are read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from worker.config import WorkerConfig, load_config
from worker.device import Device
from worker.doctor.report import Finding
from worker.engine.combinations import check_combinations
from worker.model_loader.memory_plan import place_model
from worker.model_loader.mode_plan import (
    ModePlan,
    check_folder,
    fingerprint_model,
    plan_modes,
)
from worker.model_loader.scheduler import check_scheduler
from worker.model_loader.settings_check import check_settings


def configuration(path: Path) -> Callable[[], Finding]:
    """Build the check of the TOML file."""

    def look() -> Finding:
        config = load_config(path)
        check_combinations(config)
        modes = ", ".join(mode.name for mode in config.modes)
        sizes = ", ".join(config.model.sizes)
        return Finding(f"{path}: {config.model.name} in {modes} at {sizes}", value=config)

    return look


def folder(config: WorkerConfig | None) -> Callable[[], Finding]:
    """Build the check of the model's folder: it is whole, of the right kind, and fingerprinted."""

    def look() -> Finding:
        assert config is not None, "the report skips this check without a configuration"
        check_folder(config.model.path)
        check_settings(config.model)
        check_scheduler(config.model, config.modes)
        fingerprint = fingerprint_model(config)
        return Finding(f"{config.model.path} is whole, {fingerprint}", value=fingerprint)

    return look


def scales(config: WorkerConfig | None, fingerprint: str | None) -> Callable[[], Finding]:
    """Build the check that each mode's recipe, scales or packed checkpoint fit the model."""

    def look() -> Finding:
        assert config is not None, "the report skips this check without a configuration"
        assert fingerprint is not None, "the report skips this check without a model"
        plans = plan_modes(config, fingerprint)
        quantized = [plan.config.name for plan in plans if plan.recipe is not None]
        said = f"fit {', '.join(quantized)}" if quantized else "are not needed: all modes are BF16"
        return Finding(f"recipes and scales {said}", value=plans)

    return look


def memory(
    config: WorkerConfig | None, plans: list[ModePlan] | None, device: Device | None
) -> Callable[[], Finding]:
    """Build the check that everything fits on the device, and say where it goes."""

    def look() -> Finding:
        assert config is not None, "the report skips this check without a configuration"
        assert plans is not None, "the report skips this check without scales"
        assert device is not None, "the report skips this check without a device"
        recipes, loras = [plan.recipe for plan in plans], [plan.loras for plan in plans]
        placement = place_model(config, recipes, device, device.available_bytes(), loras=loras)
        return Finding(str(placement), value=placement)

    return look
