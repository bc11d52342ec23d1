"""The processes beside the leading one when one job runs on several cards
(`worker/distributed/rank_group.py`).

The leader sends each job's order; a follower runs its part of the denoising and knows no Redis. It
does not listen to SIGTERM and SIGINT, which launchers send to everybody: when to end is for the
leader to say, who may have a job to finish.
"""

from __future__ import annotations

import logging
import signal
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import diffusers
from diffusers import WanPipeline, WanTransformer3DModel
from torch import Tensor

from jobs.spec import GenerationRequest
from quant.transformer.context_parallel import split_tokens
from worker.config import WorkerConfig
from worker.distributed.cfg_parallel import denoise_over_ranks
from worker.distributed.rank_group import RankGroup
from worker.engine.denoiser import Denoise, Embeddings, OnStep
from worker.errors import EXIT_DEVICE_LOST, RankFailed, RanksLost, RanksUnlike
from worker.model_loader.loader import Mode, load_modes
from worker.model_loader.memory_plan import check_follower
from worker.model_loader.mode_plan import check_folder, plan_modes
from worker.process.logs import JOB_ID

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RankTask:
    """All a follower needs for one job. Embeddings are on the host."""

    job_id: str | None
    request: GenerationRequest
    embeddings: Embeddings
    scheduler: str
    scheduler_config: dict[str, Any]


def lead(cards: RankGroup, modes: Sequence[Mode]) -> Denoise:
    """The leader's denoising: over all cards. Returns when they all have loaded `modes`.

    Raises:
        quant.ConversionError: a mode cannot run on several cards.
        RanksUnlike: a mode runs on other kernels on another card.
        RanksLost: another card could not load.
    """
    _share_out(cards, modes)
    among = denoise_over_ranks(cards)

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
        order = RankTask(JOB_ID.get(), request, on_host, type(scheduler).__name__, config)
        cards.tell(order)
        return cards.in_step(lambda: among(pipeline, request, embeddings, on_step))

    return denoise


def load_follower(config: WorkerConfig, cards: RankGroup) -> tuple[Mode, ...]:
    """Load what a follower needs of the model, while the leader loads the whole of it.

    Raises:
        StartError, quant.QuantError: with a sentence for the operator.
        RanksLost: another card could not load.
    """
    path = config.model.path
    check_folder(path)
    # Only the leader reads all of the weights twice, to name them by their content.
    plans = plan_modes(config, cards.hear())
    recipes = [plan.recipe for plan in plans]
    check_follower(config, recipes, cards.device, cards.device.available_bytes())
    modes = load_modes(path, plans, cards.device)
    _share_out(cards, modes)
    return modes


def follow(cards: RankGroup, modes: Sequence[Mode]) -> int:
    """Run the leader's orders until there are no more; returns the process' exit status."""
    transformers = {mode.offer.name: mode.transformer for mode in modes}
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logger.info("ready: card %d of %d follows card 0", cards.rank, cards.world)
    try:
        while (order := cards.hear()) is not None:
            job = JOB_ID.set(order.job_id)
            try:
                if not _survives(cards, transformers, order):
                    return EXIT_DEVICE_LOST
            finally:
                JOB_ID.reset(job)
    except RanksLost as error:
        logger.critical("the process ends: %s", error)
        return EXIT_DEVICE_LOST
    return 0


def _share_out(cards: RankGroup, modes: Sequence[Mode]) -> None:
    offers = [mode.offer for mode in modes]
    check_alike(cards.ask_all([(each.name, each.kernels, each.warning) for each in offers]))
    # Modes may have one transformer between them.
    for transformer in {id(mode.transformer): mode.transformer for mode in modes}.values():
        split_tokens(transformer, cards.ulysses)
    cards.warm_up()


def check_alike(cards: Sequence[Sequence[tuple[str, str | None, str | None]]]) -> None:
    """Refuse cards that run a mode on different kernels: what they exchange would not fit.

    Args:
        cards: of each card, the modes' names, kernels, and why these are not the fastest.

    Raises:
        RanksUnlike: naming the first mode and card, with that card's or the leader's warning.
    """
    for rank, modes in enumerate(cards):
        for (name, kernels, warning), (_, leaders, leaders_warning) in zip(
            modes, cards[0], strict=True
        ):
            if kernels != leaders:
                raise RanksUnlike(
                    f"Mode {name!r} runs on {kernels} kernels on card {rank} and on {leaders} on "
                    f"card 0: {warning or leaders_warning or 'the cards are not alike.'} Give the "
                    "worker cards of one kind, on which the same libraries run."
                )


def _survives(
    cards: RankGroup, transformers: Mapping[str, WanTransformer3DModel], order: RankTask
) -> bool:
    """Run one order; whether the device is fit for another one. Raises RanksLost."""
    try:
        cards.in_step(lambda: _run(cards, transformers[order.request.mode], order))
    except RanksLost:
        raise
    except Exception as error:
        # Whatever it is: the leader has heard of it and answers the job's owner for it.
        if cards.device.is_lost(error):
            logger.exception("the device is lost to this process")
            return False
        if isinstance(error, RankFailed) or cards.device.is_out_of_memory(error):
            logger.warning("the job ended here with %s: %s", type(error).__name__, error)
        else:
            logger.exception("failed with an unexpected error")
        traceback.clear_frames(error.__traceback__)
    else:
        return True
    cards.device.empty_cache()
    return True


def _run(cards: RankGroup, transformer: WanTransformer3DModel, order: RankTask) -> None:
    pipeline = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=getattr(diffusers, order.scheduler).from_config(order.scheduler_config),
        transformer=transformer,
    )
    pipeline.set_progress_bar_config(disable=True)
    prompt, negative = (
        None if each is None else each.to(cards.device.torch_device) for each in order.embeddings
    )
    assert prompt is not None, "every order has a prompt"
    denoise_over_ranks(cards)(pipeline, order.request, (prompt, negative), lambda _: None)
