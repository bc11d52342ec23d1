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
from quant.transformer.context_parallel import gather
from worker.distributed.layout import RankLayout
from worker.distributed.rank_group import RankGroup
from worker.engine.denoiser import Denoise, Embeddings, OnStep, denoise_on


def denoise_over_ranks(cards: RankGroup) -> Denoise:
    """One card's part of the denoising; every card has to run it, with equal arguments."""
    alone = denoise_on(cards.device)

    def denoise(
        pipeline: WanPipeline,
        request: GenerationRequest,
        embeddings: Embeddings,
        on_step: OnStep,
    ) -> Tensor:
        def on_each_step(done: int) -> None:
            on_step(done)
            cards.vote()  # nobody begins a step that another was told not to

        layout = RankLayout.of(cards.world, request.guidance_scale > 1.0)
        with cards.laid_out(layout) as branches:
            if branches is None:
                return alone(pipeline, request, embeddings, on_each_step)
            own = embeddings[layout.branch(cards.rank)]
            assert own is not None, "with guidance there is a negative prompt"
            whole = pipeline.transformer
            pipeline.transformer = GuidanceSplit(whole, branches, cards.vote)
            try:
                return alone(pipeline, request, (own, own), on_each_step)
            finally:
                pipeline.transformer = whole

    return denoise


class GuidanceSplit(nn.Module):
    """Stands for a transformer in a pipeline that calls it for the prompt and then for the negative
    one. The first call of a step runs the pass of this card's branch and exchanges the results; the
    second has its result then.
    """

    def __init__(
        self, transformer: nn.Module, branches: dist.ProcessGroup, vote: Callable[[], None]
    ) -> None:
        super().__init__()
        self.transformer = transformer
        self._branches = branches
        self._vote = vote
        self._negative: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # What a pipeline asks of its transformer: configuration, type, caches.
            return getattr(super().__getattr__("transformer"), name)

    def forward(self, **inputs: Any) -> tuple[Tensor]:
        """The pipeline's arguments; `encoder_hidden_states` is this card's branch's both times."""
        if self._negative is not None:
            negative, self._negative = self._negative, None
            return (negative,)
        mine = self.transformer(**inputs)[0]
        prompt, self._negative = gather(mine, self._branches, self._vote)
        return (prompt,)
