"""From prompts to embeddings, wherever the text encoder lives."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Final

import torch
from diffusers import WanPipeline
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from torch import Tensor

from jobs.errors import PromptTooLong
from jobs.record import Stage
from jobs.spec import GenerationRequest
from worker.config import ModelConfig
from worker.device import Device
from worker.engine.checks import checked, require_finite
from worker.engine.denoiser import Embeddings
from worker.engine.offload import OffloadedModule
from worker.interface import JobControl
from worker.model_loader.components import Components

MOST_KEPT: Final = 16
"""Texts whose embeddings stay in the host's memory: the 14B's have 4 MB each."""

Key = tuple[str | None, bytes]
"""Whose text it is, None for everybody's, and its SHA-256."""


class PromptEncoder:
    """Counts the tokens of prompts, and embeds them.

    The last texts' embeddings are kept, since whoever compares modes or seeds sends one prompt
    several times. They are kept for their owner alone, whose next job is faster for it: nobody is
    to learn from that what somebody else has asked for. The model's default negative prompt is
    everybody's. Texts themselves are not kept.
    """

    def __init__(self, parts: Components, device: Device, config: ModelConfig) -> None:
        """Encode with `parts`, for `device`."""
        self._parts = parts
        self._device = device
        self._max_tokens = config.text_tokens  # a longer text is refused
        self._everybodys = config.default_negative_prompt
        # Of its own: where text encoder and transformer are on different devices, a pipeline of
        # both would not know which is its own.
        self._pipeline = WanPipeline(
            tokenizer=parts.tokenizer.tokenize,
            text_encoder=parts.text_encoder,
            vae=None,
            scheduler=parts.scheduler,
        )
        visits = parts.text_encoder_place == "encode"
        self._visitor = OffloadedModule(parts.text_encoder, device.torch_device) if visits else None
        self._kept: OrderedDict[Key, Tensor] = OrderedDict()  # on the host

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

    def encode(self, request: GenerationRequest, watch: JobControl, owner: str) -> Embeddings:
        """Embed both prompts, on the device; `watch` is asked before each of the encoder's layers.

        The stage is reported only if a text has to be encoded: a job that finds all it needs tells
        nothing about how long encoding takes. The tensors are new ones each time, so that what
        blocks keep by them goes with the job.
        """
        texts = [request.prompt]
        if request.guidance_scale > 1.0:
            texts.append(request.negative_prompt)
        keys = [self._key(text, owner) for text in texts]
        for key in self._kept.keys() & keys:
            self._kept.move_to_end(key)
        new = {key: text for key, text in zip(keys, texts, strict=True) if key not in self._kept}
        if new:
            watch.progress(Stage.TEXT_ENCODER, 0, 1)
            self._embed(new, watch.check)
        home = self._device.torch_device
        prompt, *negative = (self._kept[key].to(home, copy=True) for key in keys)
        return prompt, negative[0] if negative else None

    def _key(self, text: str, owner: str) -> Key:
        whose = None if text == self._everybodys else owner
        return whose, hashlib.sha256(text.encode()).digest()

    @torch.no_grad()
    def _embed(self, texts: Mapping[Key, str], check: Callable[[], None]) -> None:
        on_host = self._parts.text_encoder_place == "host"
        there = torch.device("cpu") if on_host else self._device.torch_device
        encoder = self._parts.text_encoder
        visiting = nullcontext() if self._visitor is None else self._visitor.on_device()
        with visiting, checked(encoder.encoder.block, check):
            for key, text in texts.items():
                embedding, _ = self._pipeline.encode_prompt(
                    prompt=text,
                    do_classifier_free_guidance=False,
                    max_sequence_length=self._max_tokens,
                    device=there,
                    dtype=self._device.dtype,
                )
                # Waits for the encoder, whose weights may go when the block ends.
                embedding = embedding.cpu()
                require_finite(
                    embedding,
                    "The text encoder",
                    "If it does so for other prompts, too, the model's files are damaged.",
                )
                self._kept[key] = embedding
                if len(self._kept) > MOST_KEPT:
                    self._kept.popitem(last=False)
