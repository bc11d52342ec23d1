"""From settings to a serving worker: load the configured model and serve it until told to stop.

What can be wrong is looked for in the order of its cost: settings, configuration, Redis, artifacts,
device, model. The first fault ends the start with one line on stderr and status 1. Once it serves,
a worker waits for a Redis that is lost, however long that takes; it ends with a status of its own
when its device or its memory is beyond help (`worker/process/stats.py`, `worker/job/watchdog.py`).
"""

from __future__ import annotations

import gc
import logging
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from diffusers.utils import logging as diffusers_logging
from pydantic import ValidationError
from redis import Redis
from redis.exceptions import RedisError
from transformers.utils import logging as transformers_logging

from jobs.artifacts.store import open_artifacts
from jobs.errors import AppError
from jobs.redis_client import connect
from quant import QuantError
from worker.config import WorkerConfig, load_config
from worker.consumer.serve import ServeContext, serve
from worker.device import Device, pick_device, usable_cores
from worker.distributed.follower import follow, lead, load_follower
from worker.distributed.layout import check_ranks
from worker.distributed.rank_group import RankGroup, meet
from worker.engine.step_cache import check_single_rank
from worker.engine.wan_engine import WanEngine
from worker.errors import EXIT_DEVICE_LOST, RanksLost, StartError
from worker.model_loader.loader import load_model
from worker.model_loader.memory_plan import place_model
from worker.model_loader.mode_plan import (
    check_folder,
    choose_kernels,
    fingerprint_model,
    plan_modes,
)
from worker.model_loader.tokenizer import read_tokenizer
from worker.process.logs import configure_logging
from worker.settings import WorkerSettings

logger = logging.getLogger("worker")


def main(
    config: Annotated[
        Path | None, typer.Option(help="The worker's TOML file; overrides WORKER_CONFIG.")
    ] = None,
) -> None:
    """Serve one model, in the modes of a configuration file, to a Redis queue."""
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    try:
        settings = WorkerSettings()
        ids = configure_logging(settings.log_format)
        with ExitStack() as opened:
            if settings.rank > 0:
                ids.worker_id = f"card-{settings.rank}"
                status = start_follower(settings, config, opened)
            else:
                parts = start(settings, config, opened)
                status = serve(parts, settings, ids)
            if status:
                logger.critical("the process ends with status %d, to be started afresh", status)
                logging.shutdown()
                os._exit(status)  # a device that is lost may hang an orderly end
    except ValidationError as error:
        problems = (f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        fail(f"The environment is not set up: {'; '.join(problems)}.")
    except (StartError, QuantError, AppError, RanksLost) as error:
        fail(str(error))
    except torch.OutOfMemoryError as error:
        fail(f"The device has too little memory for the model: {error}")
    except torch.AcceleratorError as error:
        typer.echo(f"worker: The device has failed: {' '.join(str(error).split())}", err=True)
        os._exit(EXIT_DEVICE_LOST)  # as above


def start(settings: WorkerSettings, config_path: Path | None, opened: ExitStack) -> ServeContext:
    """Load the model and log what an operator wants to know about it.

    What has to be closed again is left in `opened`, also when the start fails.
    """
    started = time.perf_counter()
    with resting_collector():
        config = load_config(config_path or settings.config)
        redis = opened.enter_context(open_redis(settings.redis_url.get_secret_value()))
        artifacts = open_artifacts(settings.artifacts_url)
        artifacts.probe()
        device, cards = opened.enter_context(join_ranks(settings, config))
        engine = load_engine(config, device, cards)
    for line in engine.describe():
        logger.info(line)
    logger.info("seconds to ready: %.1f", time.perf_counter() - started)
    return ServeContext(engine, redis, artifacts)


def load_engine(config: WorkerConfig, device: Device, cards: RankGroup | None = None) -> WanEngine:
    """Load the configured model and modes onto `device`, after checking that everything fits.

    Args:
        cards: those that run each job together with this one, which leads them.

    Raises:
        StartError, quant.QuantError: with a sentence for the operator.
    """
    path = config.model.path
    check_folder(path)
    fingerprint = fingerprint_model(config)
    if cards is not None:
        cards.tell(fingerprint)
    plans = plan_modes(config, fingerprint)
    recipes = [plan.recipe for plan in plans]
    placement = place_model(config, recipes, device, device.available_bytes())
    logger.info("%s", placement)
    with ThreadPoolExecutor(1, "tokenizer") as beside:
        reading = beside.submit(read_tokenizer, path / "tokenizer")
        choices = choose_kernels(plans, device)
        if reading.done():
            reading.result()  # its fault, if it had one, before any weights are read
        modes, parts = load_model(path, plans, device, placement, choices, reading.result)
    denoise = None if cards is None else lead(cards, modes)
    return WanEngine(config.model, fingerprint, device, parts, modes, denoise)


def start_follower(settings: WorkerSettings, config_path: Path | None, opened: ExitStack) -> int:
    """Load the model and follow the leading card until it ends; returns the status to end with."""
    with resting_collector():
        config = load_config(config_path or settings.config)
        _, cards = opened.enter_context(join_ranks(settings, config))
        assert cards is not None, "a follower is one of several"
        loaded = load_follower(config, cards)
    return follow(cards, loaded)


@contextmanager
def join_ranks(
    settings: WorkerSettings, config: WorkerConfig
) -> Iterator[tuple[Device, RankGroup | None]]:
    """Take this process' device and, where there are several processes, meet the others.

    The leader's end, unless it is an error, is the followers' end, too.
    """
    world = settings.world_size
    threads = settings.threads or max(1, usable_cores() // world)
    device = pick_device(settings.device, threads, settings.local_rank)
    if world == 1:
        yield device, None
        return
    check_folder(config.model.path)
    check_ranks(world, config.model.path, config.model.sizes)
    check_single_rank(config)
    device = replace(device, name=f"{world} x {device.name}")
    with meet(device) as cards:
        yield device, cards


@contextmanager
def resting_collector() -> Iterator[None]:
    """Have no garbage looked for within, and nothing that is left afterwards looked through again.

    What is imported and loaded stays. Hundreds of thousands of new objects would set off the
    collector time and again, and each time it would walk all of torch: a quarter of what the
    imports take (`worker.__main__`), and most of what a transformer's modules would. Later it would
    walk the model in the middle of a job.
    """
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.collect()  # what a loading left in cycles may hold weights
        gc.freeze()
        gc.enable()


def open_redis(url: str) -> Redis:
    """Connect, and make sure that somebody answers before a model is loaded for minutes."""
    try:
        redis = connect(url)
    except ValueError as error:
        raise StartError(f"Redis cannot be reached: {error}. Check REDIS_URL.") from error
    try:
        redis.ping()
    except RedisError as error:
        redis.close()
        raise StartError(f"Redis cannot be reached: {error}. Check REDIS_URL.") from error
    return redis


def fail(reason: str) -> None:
    """End the process with one line."""
    typer.echo(f"worker: {' '.join(reason.split())}", err=True)
    raise typer.Exit(1)
