"""Skip parts of denoising steps that resemble earlier ones, with diffusers' own hooks.

Every job starts with an empty cache: the hooks are registered when its denoising begins and removed
when it ends, even with an error. The passes of the prompt and of the negative prompt have separate
caches (the pipeline's `cache_context`). While a job runs, residuals of the size of the hidden
states are kept on the device: three for each kind of pass with the first-block cache, two with
MagCache.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffusers.hooks import FirstBlockCacheConfig, HookRegistry, MagCacheConfig
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry

from quant.transformer.wan_block import FusedWanBlock
from worker.config import FirstBlockCache, StepCache


@contextmanager
def step_cache(transformer: Any, config: StepCache | None, steps: int) -> Iterator[None]:
    """Cache across the steps of one job for the duration of the context.

    Args:
        transformer: a `WanTransformer3DModel`; its blocks may be fused.
        config: None to compute every step in full.
        steps: the job's number of steps.
    """
    if config is None:
        yield
        return
    register_fused_blocks()
    transformer.enable_cache(_for_diffusers(config, steps))
    try:
        yield
    finally:
        # Removed hooks are in reference cycles, so their residuals would stay until the next
        # garbage collection. The pipeline clears them at its end, but a job may stop before.
        HookRegistry.check_if_exists_or_initialize(transformer).reset_stateful_hooks()
        transformer.disable_cache()


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
    """Register the fused block with diffusers' hooks, with the outputs of the original block."""
    TransformerBlockRegistry.register(
        FusedWanBlock,
        TransformerBlockMetadata(
            return_hidden_states_index=0, return_encoder_hidden_states_index=None
        ),
    )
