"""From prompts to embeddings, wherever the text encoder lives."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Final

import torch
from diffusers import WanPipeline
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from torch import Tensor, nn

from jobs.errors import PromptTooLong
from jobs.spec import GenerationRequest
from quant.kernels.visitor import Visitor
from worker.denoising import Embeddings
from worker.devices import Device
from worker.shared_parts import SharedParts

MOST_KEPT: Final = 16
"""Texts whose embeddings stay in the host's memory: the 14B's have 4 MB each."""


class PromptEncoder:
    """Counts the tokens of prompts, and embeds them.

    The last texts' embeddings are kept: jobs have their negative prompt in common, and whoever
    compares modes or seeds sends one prompt several times.
    """

    def __init__(self, parts: SharedParts, device: Device, max_tokens: int) -> None:
        """max_tokens: what the text encoder sees; a longer text is refused."""
        self._parts = parts
        self._device = device
        self._max_tokens = max_tokens
        # Of its own: where text encoder and transformer are on different devices, a pipeline of
        # both would not know which is its own.
        self._pipeline = WanPipeline(
            tokenizer=parts.tokenizer.tokenize,
            text_encoder=parts.text_encoder,
            vae=None,
            scheduler=parts.scheduler,
        )
        visits = parts.text_encoder_place == "encode"
        self._visitor = Visitor(parts.text_encoder, device.torch_device) if visits else None
        self._kept: OrderedDict[str, Tensor] = OrderedDict()  # on the host

    def count_tokens(self, text: str) -> int:
        """Count a prompt's tokens as the pipeline would: cleaned, and with the closing one."""
        return len(self._parts.tokenizer.tokenize(prompt_clean(text)).input_ids)

    def refuse_too_long(self, request: GenerationRequest) -> None:
        """Raise PromptTooLong for a text that the pipeline would cut."""
        bound = self._max_tokens
        for name in ("prompt", "negative_prompt"):
            tokens = self.count_tokens(getattr(request, name))
            if tokens > bound:
                raise PromptTooLong(
                    f"{name} has {tokens} tokens, more than {bound}; shorten it.",
                    field=name,
                    tokens=tokens,
                    bound=bound,
                )

    def encode(self, request: GenerationRequest, check: Callable[[], None]) -> Embeddings:
        """Embed both prompts, on the device; `check` is called before each of the encoder's layers.

        The tensors are new ones each time, and what blocks make of them is not kept beyond a job.
        """
        texts = [request.prompt]
        if request.guidance_scale > 1.0:
            texts.append(request.negative_prompt)
        for text in self._kept.keys() & texts:
            self._kept.move_to_end(text)
        self._embed([text for text in dict.fromkeys(texts) if text not in self._kept], check)
        home = self._device.torch_device
        prompt, *negative = (self._kept[text].to(home, copy=True) for text in texts)
        return prompt, negative[0] if negative else None

    @torch.no_grad()
    def _embed(self, texts: list[str], check: Callable[[], None]) -> None:
        if not texts:
            return
        on_host = self._parts.text_encoder_place == "host"
        there = torch.device("cpu") if on_host else self._device.torch_device
        encoder = self._parts.text_encoder
        visiting = nullcontext() if self._visitor is None else self._visitor.on_device()
        with visiting, checked(encoder.encoder.block, check):
            for text in texts:
                embedding, _ = self._pipeline.encode_prompt(
                    prompt=text,
                    do_classifier_free_guidance=False,
                    max_sequence_length=self._max_tokens,
                    device=there,
                    dtype=self._device.dtype,
                )
                # Waits for the encoder, whose weights may go when the block ends.
                self._kept[text] = embedding.cpu()
                if len(self._kept) > MOST_KEPT:
                    self._kept.popitem(last=False)


@contextmanager
def checked(modules: Iterable[nn.Module], check: Callable[[], None]) -> Iterator[None]:
    """Call `check` before each of `modules` runs; what it raises ends the forward pass there."""
    handles = [module.register_forward_pre_hook(lambda *_: check()) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
