"""Run the prompt and the negative prompt of each step on different ranks (CFG parallelism).

Every rank runs the same pipeline with the same noise and the same scheduler, so all ranks have the
same latents after each step. Only the forward pass is divided, beneath the pipeline.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from diffusers import WanPipeline
from torch import Tensor, nn

from jobs.spec import GenerationRequest
from quant.transformer.context_parallel import all_gather
from worker.distributed.layout import RankLayout
from worker.distributed.rank_group import RankGroup
from worker.engine.denoiser import Denoise, Embeddings, OnStep, denoise_on


def denoise_over_ranks(ranks: RankGroup) -> Denoise:
    """Build this rank's denoising function, which all ranks must call with equal arguments."""
    denoise_here = denoise_on(ranks.device)

    def denoise(
        pipeline: WanPipeline,
        request: GenerationRequest,
        embeddings: Embeddings,
        on_step: OnStep,
    ) -> Tensor:
        def on_each_step(done: int, predicted: Tensor) -> None:
            on_step(done, predicted)
            ranks.sync_or_abort()  # no rank starts a step that another one must not do

        layout = RankLayout.of(ranks.world, request.guidance_scale > 1.0)
        with ranks.use_layout(layout) as branches:
            if branches is None:
                return denoise_here(pipeline, request, embeddings, on_each_step)
            own = embeddings[layout.branch(ranks.rank)]
            assert own is not None, "with guidance there is a negative prompt"
            transformer = pipeline.transformer
            pipeline.transformer = CfgParallelTransformer(
                transformer, branches, ranks.sync_or_abort
            )
            try:
                return denoise_here(pipeline, request, (own, own), on_each_step)
            finally:
                pipeline.transformer = transformer

    return denoise


class CfgParallelTransformer(nn.Module):
    """A wrapper of the transformer in a pipeline that calls it twice per step.

    The pipeline calls it for the prompt and then for the negative prompt. The first call runs the
    forward pass of this rank's branch and exchanges the results; the second returns the result of
    the other branch, which is known by then.
    """

    def __init__(
        self, transformer: nn.Module, branches: dist.ProcessGroup, sync_or_abort: Callable[[], None]
    ) -> None:
        super().__init__()
        self.transformer = transformer
        self._branches = branches
        self._sync_or_abort = sync_or_abort
        self._negative: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # A pipeline reads its transformer's configuration, type and caches.
            return getattr(super().__getattr__("transformer"), name)

    def forward(self, **inputs: Any) -> tuple[Tensor]:
        """Run one forward pass; `encoder_hidden_states` is this rank's branch in both calls."""
        if self._negative is not None:
            negative, self._negative = self._negative, None
            return (negative,)
        own = self.transformer(**inputs)[0]
        prompt, self._negative = all_gather(own, self._branches, self._sync_or_abort)
        return (prompt,)
