"""Make all checks of a worker, in the order of cost; each says which earlier ones it needs."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from quant.device import backend
from worker.config import WorkerConfig
from worker.device import Device
from worker.doctor import card, exchange, model, services, system
from worker.doctor.report import Report
from worker.model_loader.mode_plan import ModePlan
from worker.process.scratch import scratch_folder
from worker.settings import WorkerSettings


def examine(report: Report, config_path: Path | None, opened: ExitStack) -> None:
    """Fill `report`; what stays open until the end is put into `opened`."""
    _quieten(opened)
    settings: WorkerSettings = report.run("settings", services.settings)
    if settings is None:
        settings = services.settings_without_store()
    url = settings.redis_url.get_secret_value()
    with suppress(ValueError):  # the check of Redis says what is wrong with it
        report.hide(urlsplit(url).password)
    report.run("versions", system.versions)
    report.run("environment", system.environment)
    report.run("driver", lambda: system.driver(settings.device))
    report.run("CANN", lambda: system.cann(settings.device))
    report.run("ffmpeg", system.ffmpeg)
    redis = report.run("Redis", services.redis(url, opened))
    store = services.artifacts(settings.artifacts_url, redis)
    report.run("artifact store", store, ("settings", "Redis"))
    config, plans = _files(report, config_path or settings.config)
    device = report.run("device", card.device(settings))
    report.run("memory plan", model.memory(config, plans, device), ("scales", "device"))
    report.run("kernels", card.kernels(plans, device), ("scales", "device"))
    engine = report.run("model", card.engine(config, device), ("memory plan", "kernels"))
    scratch = opened.enter_context(scratch_folder()) if "ffmpeg" in report.values else None
    for index, mode in enumerate(config.modes if config is not None else ()):
        folder = scratch if index == 0 else None  # without ffmpeg no MP4, and the rest is tried
        report.run(f"tiny job in {mode.name}", card.tiny_job(engine, mode.name, folder), ("model",))
    report.run("between cards", exchange.between_cards(device, _count(device)), ("device",))


def examine_files(report: Report, config_path: Path | None, opened: ExitStack) -> None:
    """Fill `report` with the checks of files alone, which need no device, Redis or store."""
    _quieten(opened)
    _files(report, config_path or services.settings_without_store().config)


def _files(report: Report, config_path: Path) -> tuple[WorkerConfig | None, list[ModePlan] | None]:
    config = report.run("configuration", model.configuration(config_path))
    fingerprint = report.run("model folder", model.folder(config), ("configuration",))
    plans = report.run("scales", model.scales(config, fingerprint), ("model folder",))
    return config, plans


def _quieten(opened: ExitStack) -> None:
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    opened.enter_context(_only_errors(logging.getLogger("worker")))  # the report says the rest


@contextmanager
def _only_errors(logger: logging.Logger) -> Iterator[None]:
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _count(device: Device | None) -> int:
    if device is None or device.kind == "cpu":
        return 1
    return int(backend(device.kind).device_count())
