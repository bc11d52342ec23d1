"""Leave out parts of denoising steps that resemble earlier ones, by diffusers' own hooks.

What a step may leave out is judged anew in every job: the hooks are put on when a job's denoising
begins and taken off when it ends, however it ends, so nothing of one job is there in the next. The
prompt's passes and the negative prompt's are judged and kept apart (the pipeline's
`cache_context`). While a job runs, residuals of the size of the hidden states are kept on the
device: three for each kind of pass with the first block's cache, two with MagCache.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffusers.hooks import FirstBlockCacheConfig, HookRegistry, MagCacheConfig
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry

from quant.transformer.wan_block import FusedWanBlock
from worker.config import FirstBlockCache, StepCache, WorkerConfig
from worker.errors import ConfigError


@contextmanager
def step_cache(transformer: Any, config: StepCache | None, steps: int) -> Iterator[None]:
    """Cache across the steps of one job while the context lasts.

    Args:
        transformer: a `WanTransformer3DModel`; its blocks may be fused.
        config: None to compute every step in full.
        steps: how many the job has.
    """
    if config is None:
        yield
        return
    register_fused_blocks()
    transformer.enable_cache(_for_diffusers(config, steps))
    try:
        yield
    finally:
        # Removed hooks lie in cycles until Python's collector comes by, and what they keep with
        # them: the pipeline clears it at its end, but not that of a job that ends before.
        HookRegistry.check_if_exists_or_initialize(transformer).reset_stateful_hooks()
        transformer.disable_cache()


def check_single_rank(config: WorkerConfig) -> None:
    """Refuse step caches where a job runs on several cards.

    Each card would judge by its own part of the tokens what a step may leave out, and wait for
    others that judged otherwise.

    Raises:
        ConfigError: naming the modes.
    """
    cached = [mode.name for mode in config.modes if mode.step_cache is not None]
    if cached:
        raise ConfigError(
            f"Modes {', '.join(cached)} have a step_cache, which works on one card only: start the "
            "worker without torchrun, or take it out of the configuration."
        )


def _for_diffusers(config: StepCache, steps: int) -> FirstBlockCacheConfig | MagCacheConfig:
    if isinstance(config, FirstBlockCache):
        return FirstBlockCacheConfig(threshold=config.threshold)
    return MagCacheConfig(
        threshold=config.threshold,
        max_skip_steps=config.max_skipped_steps,
        retention_ratio=config.kept_share,
        num_inference_steps=steps,
        mag_ratios=list(config.mag_ratios),
    )


def register_fused_blocks() -> None:
    """Tell diffusers' hooks what a fused block takes and gives: what the one it stands for does."""
    TransformerBlockRegistry.register(
        FusedWanBlock,
        TransformerBlockMetadata(
            return_hidden_states_index=0, return_encoder_hidden_states_index=None
        ),
    )
