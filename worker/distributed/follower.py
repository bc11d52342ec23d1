"""Run the follower ranks when one job runs on several ranks (`worker/distributed/rank_group.py`).

The leader broadcasts each job's task. A follower runs its part of the denoising and knows no Redis.
It ignores SIGTERM and SIGINT, which launchers send to all processes: the leader may have to finish
a job first, and then shuts the followers down.
"""

from __future__ import annotations

import logging
import signal
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffusers import WanPipeline, WanTransformer3DModel
from torch import Tensor

from jobs.spec import GenerationRequest
from quant.transformer.context_parallel import split_tokens
from worker.config import WorkerConfig
from worker.distributed.agreement import check_same_kernels, check_same_plans
from worker.distributed.cfg_parallel import denoise_over_ranks
from worker.distributed.rank_group import RankGroup
from worker.engine.denoiser import Denoise, Embeddings, OnStep
from worker.errors import EXIT_DEVICE_LOST, RankFailed, RanksLost
from worker.interface import JOB_ID
from worker.model_loader.loader import Mode, load_modes
from worker.model_loader.memory_plan import check_follower
from worker.model_loader.mode_plan import check_folder, plan_modes
from worker.model_loader.scheduler import make_scheduler, scheduler_name

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RankTask:
    """The task of the followers for one job. The embeddings are on the host."""

    job_id: str | None
    request: GenerationRequest
    embeddings: Embeddings
    scheduler: str
    scheduler_config: dict[str, Any]


def lead_ranks(ranks: RankGroup, modes: Sequence[Mode]) -> Denoise:
    """Build the leader's function that denoises over all ranks, once all have loaded `modes`.

    Raises:
        quant.ConversionError: a mode cannot run on several ranks.
        RanksDiffer: a mode runs on other kernels on another rank.
        RanksLost: another rank could not load.
    """
    _prepare_ranks(ranks, modes)
    denoise_part = denoise_over_ranks(ranks)

    def denoise(
        pipeline: WanPipeline,
        request: GenerationRequest,
        embeddings: Embeddings,
        on_step: OnStep,
    ) -> Tensor:
        scheduler = pipeline.scheduler
        prompt, negative = embeddings
        on_host = (prompt.cpu(), None if negative is None else negative.cpu())
        config = dict(scheduler.config)
        task = RankTask(JOB_ID.get(), request, on_host, scheduler_name(scheduler), config)
        ranks.broadcast(task)
        return ranks.run_together(lambda: denoise_part(pipeline, request, embeddings, on_step))

    return denoise


def load_follower(config: WorkerConfig, ranks: RankGroup) -> tuple[Mode, ...]:
    """Load the part of the model that a follower needs, while the leader loads all of it.

    Raises:
        StartError, quant.QuantError: with a sentence for the operator.
        RanksLost: another rank could not load.
    """
    path = config.model.path
    check_folder(path)
    # Only the leader reads all weights twice, to compute the fingerprint.
    plans = plan_modes(config, ranks.receive())
    check_same_plans(ranks, plans)
    recipes, loras = [plan.recipe for plan in plans], [plan.loras for plan in plans]
    available = ranks.device.available_bytes()
    storage = check_follower(config, recipes, ranks.device, available, loras)
    modes = load_modes(path, plans, ranks.device, weight_storage=storage)
    _prepare_ranks(ranks, modes)
    return modes


def follow(ranks: RankGroup, modes: Sequence[Mode]) -> int:
    """Run the leader's tasks until it shuts down; return the process' exit status."""
    transformers = {mode.offer.name: mode.transformer for mode in modes}
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logger.info("ready: rank %d of %d follows rank 0", ranks.rank, ranks.world)
    try:
        while (task := ranks.receive()) is not None:
            job_token = JOB_ID.set(task.job_id)
            try:
                if not _run_task(ranks, transformers, task):
                    return EXIT_DEVICE_LOST
            finally:
                JOB_ID.reset(job_token)
    except RanksLost as error:
        logger.critical("the process ends: %s", error)
        return EXIT_DEVICE_LOST
    return 0


def _prepare_ranks(ranks: RankGroup, modes: Sequence[Mode]) -> None:
    """Compare the ranks' kernels, split the transformers' tokens, and connect all groups."""
    check_same_kernels(ranks, modes)
    # Several modes may share one transformer.
    for transformer in {id(mode.transformer): mode.transformer for mode in modes}.values():
        split_tokens(transformer, ranks.ulysses)
    ranks.warm_up()


def _run_task(
    ranks: RankGroup, transformers: Mapping[str, WanTransformer3DModel], task: RankTask
) -> bool:
    """Run one task; return whether the device can run another one. Raises RanksLost."""
    try:
        ranks.run_together(lambda: _denoise(ranks, transformers[task.request.mode], task))
    except RanksLost:
        raise
    except Exception as error:
        # Any error: the leader has received it and ends the job with it.
        if ranks.device.is_lost(error):
            logger.exception("the device is lost to this process")
            return False
        if isinstance(error, RankFailed) or ranks.device.is_out_of_memory(error):
            logger.warning("the job ended here with %s: %s", type(error).__name__, error)
        else:
            logger.exception("failed with an unexpected error")
        traceback.clear_frames(error.__traceback__)
    else:
        return True
    ranks.device.empty_cache()
    return True


def _denoise(ranks: RankGroup, transformer: WanTransformer3DModel, task: RankTask) -> None:
    pipeline = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=make_scheduler(task.scheduler, task.scheduler_config),
        transformer=transformer,
    )
    pipeline.set_progress_bar_config(disable=True)
    prompt, negative = (
        None if each is None else each.to(ranks.device.torch_device) for each in task.embeddings
    )
    assert prompt is not None, "every task has a prompt"
    denoise_over_ranks(ranks)(pipeline, task.request, (prompt, negative), lambda _, __: None)
