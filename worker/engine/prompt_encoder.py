"""Encode prompts into embeddings, and cache the latest ones per owner."""

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
from worker.engine.checks import check_before_each, require_finite
from worker.engine.denoiser import Embeddings
from worker.engine.offload import OffloadedModule
from worker.interface import JobControl
from worker.model_loader.components import Components

MAX_CACHED: Final = 16
"""How many embeddings are cached in host memory; the 14B model's have 4 MB each."""

Key = tuple[str | None, bytes]
"""The owner of a text, None for the text that all share, and its SHA-256."""


class PromptEncoder:
    """Counts the tokens of prompts and encodes them.

    The embeddings of the latest texts are cached, because a caller who compares modes or seeds
    sends the same prompt several times. They are cached per owner: a cached prompt makes a job
    faster, and no owner may learn from that what another one has asked for. The model's default
    negative prompt is shared by all owners. Texts themselves are not kept.
    """

    def __init__(self, components: Components, device: Device, config: ModelConfig) -> None:
        """Prepare to encode with `components`, into embeddings on `device`."""
        self._components = components
        self._device = device
        self._max_tokens = config.text_tokens  # a longer text is refused
        self._shared_text = config.default_negative_prompt
        # A separate pipeline: with text encoder and transformer on different devices, one pipeline
        # of both could not tell which device is its own.
        self._pipeline = WanPipeline(
            tokenizer=components.tokenizer.tokenize,
            text_encoder=components.text_encoder,
            vae=None,
            scheduler=components.scheduler,
        )
        self._offloaded: OffloadedModule | None = None
        if components.text_encoder_placement == "encode":
            self._offloaded = OffloadedModule(components.text_encoder, device.torch_device)
        self._cache: OrderedDict[Key, Tensor] = OrderedDict()  # on the host

    def count_tokens(self, text: str) -> int:
        """Count a prompt's tokens as the pipeline does: cleaned, and with the closing token."""
        return len(self._components.tokenizer.tokenize(prompt_clean(text)).input_ids)

    def refuse_too_long(self, request: GenerationRequest) -> None:
        """Raise PromptTooLong for a text that the pipeline would truncate."""
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

    def encode(self, request: GenerationRequest, control: JobControl, owner: str) -> Embeddings:
        """Encode both prompts; the embeddings are on the device.

        `control.check` is called before each of the encoder's layers. The stage is reported only if
        a text has to be encoded: a job with cached embeddings says nothing about how long encoding
        takes. The tensors are new copies each time, so that what blocks store with them is freed
        with the job, and two even for equal texts: `denoising_run` tells passes apart by them.
        """
        texts = [request.prompt]
        if request.guidance_scale > 1.0:
            texts.append(request.negative_prompt)
        keys = [self._key(text, owner) for text in texts]
        for key in self._cache.keys() & keys:
            self._cache.move_to_end(key)
        new = {key: text for key, text in zip(keys, texts, strict=True) if key not in self._cache}
        if new:
            control.progress(Stage.TEXT_ENCODER, 0, 1)
            self._encode_texts(new, control.check)
        device = self._device.torch_device
        prompt, *negative = (self._cache[key].to(device, copy=True) for key in keys)
        return prompt, negative[0] if negative else None

    def _key(self, text: str, owner: str) -> Key:
        scope = None if text == self._shared_text else owner
        return scope, hashlib.sha256(text.encode()).digest()

    @torch.no_grad()
    def _encode_texts(self, texts: Mapping[Key, str], check: Callable[[], None]) -> None:
        on_host = self._components.text_encoder_placement == "host"
        device = torch.device("cpu") if on_host else self._device.torch_device
        encoder = self._components.text_encoder
        loaded = nullcontext() if self._offloaded is None else self._offloaded.on_device()
        with loaded, check_before_each(encoder.encoder.block, check):
            for key, text in texts.items():
                embedding, _ = self._pipeline.encode_prompt(
                    prompt=text,
                    do_classifier_free_guidance=False,
                    max_sequence_length=self._max_tokens,
                    device=device,
                    dtype=self._device.dtype,
                )
                # Waits for the encoder, whose weights may leave the device when the block ends.
                embedding = embedding.cpu()
                require_finite(
                    embedding,
                    "The text encoder",
                    "If it does so for other prompts, too, the model's files are damaged.",
                )
                self._cache[key] = embedding
                if len(self._cache) > MAX_CACHED:
                    self._cache.popitem(last=False)
