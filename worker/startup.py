"""Start a worker: read the settings, load the configured model, and serve it until asked to stop.

The start checks in the order of cost: settings, configuration, Redis, artifacts, device, model. At
last a tiny job goes through every stage and mode (`worker/job/proof.py`). The first fault ends the
start with one line on stderr and status 1. A worker that serves waits for a lost Redis without
limit. It ends with a status of its own when its device or its memory cannot recover
(`worker/errors.py`).
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

import typer
from diffusers.utils import logging as diffusers_logging
from pydantic import ValidationError
from redis import Redis
from redis.exceptions import RedisError
from transformers.utils import logging as transformers_logging

from jobs.artifacts.known_store import KnownArtifactStore, open_known_artifacts
from jobs.errors import AppError
from jobs.redis_client import connect
from jobs.store.durability import read_risks
from jobs.telemetry import tracing
from quant import QuantError
from worker.config import WorkerConfig, load_config
from worker.consumer.serve import ServeContext, serve
from worker.device import Device, is_lost, is_out_of_memory, pick_device, usable_cores
from worker.distributed.agreement import check_same_plans
from worker.distributed.follower import follow, lead_ranks, load_follower
from worker.distributed.layout import check_ranks
from worker.distributed.rank_group import RankGroup, join
from worker.engine.combinations import check_combinations
from worker.engine.wan_engine import WanEngine
from worker.errors import EXIT_DEVICE_LOST, RanksLost, StartError
from worker.job.proof import prove
from worker.model_loader.finite_weights import check_finite
from worker.model_loader.latent_preview import load_latent_preview
from worker.model_loader.loader import load_model
from worker.model_loader.memory_plan import place_model
from worker.model_loader.mode_plan import (
    check_folder,
    choose_kernels,
    fingerprint_model,
    plan_modes,
)
from worker.model_loader.scheduler import check_scheduler
from worker.model_loader.settings_check import check_settings, check_vocabulary
from worker.model_loader.tokenizer import read_tokenizer
from worker.process.logs import configure_logging
from worker.process.systemd import SystemdNotifier
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
                ids.worker_id = f"rank-{settings.rank}"
                status = start_follower(settings, config, opened)
            else:
                # Followers make no spans: the leader has the job.
                tracing.start(settings, "wan-worker")
                opened.callback(tracing.stop)
                context = start(settings, config, opened)
                with SystemdNotifier():
                    status = serve(context, settings, ids)
            tracing.stop()
            if status:
                logger.critical("the process ends with status %d, to be started afresh", status)
                logging.shutdown()
                os._exit(status)  # a lost device may block a normal exit
    except ValidationError as error:
        problems = (f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        fail(f"The environment is not set up: {'; '.join(problems)}.")
    except (StartError, QuantError, AppError, RanksLost) as error:
        fail(str(error))
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            fail(f"The device has too little memory for the model: {error}")
        if not is_lost(error):
            raise
        typer.echo(f"worker: The device has failed: {' '.join(str(error).split())}", err=True)
        os._exit(EXIT_DEVICE_LOST)  # as above


def start(settings: WorkerSettings, config_path: Path | None, opened: ExitStack) -> ServeContext:
    """Load the model, prove that it makes videos, and log a description of it for operators.

    Whatever must be closed again is put into `opened`, also when the start fails.
    """
    started = time.perf_counter()
    with paused_gc():
        config = load_config(config_path or settings.config)
        check_combinations(config, settings.world_size)
        redis = opened.enter_context(open_redis(settings.redis_url.get_secret_value()))
        for risk in read_risks(redis):
            logger.warning("%s", risk.detail)
        artifacts = open_store(settings.artifacts_url, redis)
        device, ranks = opened.enter_context(join_ranks(settings, config))
        engine = load_engine(config, device, ranks)
        prove(engine)
    for line in engine.describe():
        logger.info(line)
    logger.info("seconds to ready: %.1f", time.perf_counter() - started)
    return ServeContext(engine, redis, artifacts)


def start_follower(settings: WorkerSettings, config_path: Path | None, opened: ExitStack) -> int:
    """Load the model and follow the leader until it ends; return the status to end with."""
    with paused_gc():
        config = load_config(config_path or settings.config)
        check_combinations(config, settings.world_size)
        _, ranks = opened.enter_context(join_ranks(settings, config))
        assert ranks is not None, "a follower is one of several ranks"
        modes = load_follower(config, ranks)
    return follow(ranks, modes)


def load_engine(config: WorkerConfig, device: Device, ranks: RankGroup | None = None) -> WanEngine:
    """Load the configured model and modes onto `device`, after checking that everything fits.

    Args:
        ranks: the ranks that run each job together; this process is their leader.

    Raises:
        StartError, quant.QuantError: with a sentence for the operator.
    """
    path = config.model.path
    check_folder(path)
    check_settings(config.model)
    check_scheduler(config.model, config.modes)
    fingerprint = fingerprint_model(config)
    if ranks is not None:
        ranks.broadcast(fingerprint)
    plans = plan_modes(config, fingerprint)
    if ranks is not None:
        check_same_plans(ranks, plans)
    recipes, loras = [plan.recipe for plan in plans], [plan.loras for plan in plans]
    placement = place_model(config, recipes, device, device.available_bytes(), loras=loras)
    logger.info("%s", placement)
    with ThreadPoolExecutor(1, "tokenizer") as executor:
        reading = executor.submit(read_tokenizer, path / "tokenizer")
        kernels = choose_kernels(plans, device)
        if reading.done():
            reading.result()  # raises its error, if any, before weights are read
        modes, components = load_model(path, plans, device, placement, kernels, reading.result)
    check_vocabulary(components)
    check_finite(components, modes)
    denoise = None if ranks is None else lead_ranks(ranks, modes)
    preview = load_latent_preview(config, device, components.vae)
    components = replace(components, preview=preview)
    return WanEngine(config.model, fingerprint, device, components, modes, denoise)


@contextmanager
def join_ranks(
    settings: WorkerSettings, config: WorkerConfig
) -> Iterator[tuple[Device, RankGroup | None]]:
    """Select this process' device and, if there are several ranks, join them.

    When the leader leaves the context without an error, the followers end as well.
    """
    world = settings.world_size
    threads = settings.threads or max(1, usable_cores() // world)
    device = pick_device(settings.device, threads, settings.local_rank)
    if world == 1:
        yield device, None
        return
    check_folder(config.model.path)
    check_ranks(world, config.model.path, config.model.sizes)
    device = replace(device, name=f"{world} x {device.name}")
    with join(device) as ranks:
        yield device, ranks


def open_redis(url: str) -> Redis:
    """Connect to Redis and check that it answers, before minutes are spent on loading a model."""
    try:
        redis = connect(url)
    except ValueError as error:
        raise StartError(f"REDIS_URL cannot be used: {error}.") from None
    try:
        redis.ping()
    except RedisError as error:
        redis.close()
        reason = str(error).rstrip(".")
        raise StartError(f"Redis cannot be reached: {reason}. Check REDIS_URL.") from error
    return redis


def open_store(url: str, redis: Redis) -> KnownArtifactStore:
    """Open the artifact store, and check that it is the right one and can be written to."""
    artifacts = open_known_artifacts(url, redis)
    try:
        artifacts.probe()
    except RedisError as error:
        raise StartError(f"Redis does not say which artifact store it knows: {error}.") from error
    return artifacts


def fail(reason: str) -> None:
    """End the process with one line on stderr and status 1."""
    typer.echo(f"worker: {' '.join(reason.split())}", err=True)
    raise typer.Exit(1)


@contextmanager
def paused_gc() -> Iterator[None]:
    """Pause garbage collection in the block, and exclude the objects that exist after it for good.

    What is imported and loaded stays until the process ends. Hundreds of thousands of new objects
    would trigger the collector again and again, and each time it would visit all of torch: a
    quarter of the time of the imports (`worker.__main__`), and most of the time of making a
    transformer's modules. Later it would visit the whole model in the middle of a job.
    """
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.collect()  # cycles left by loading may hold weights
        gc.freeze()
        gc.enable()
