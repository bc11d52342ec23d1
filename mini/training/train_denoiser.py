"""Train transformer and text encoder together (second stage), by flow matching on encoded scenes.

The input is x_t = (1 - sigma) * x_0 + sigma * noise, the target is noise - x_0. Sigma is
logit-normal and shifted as in sampling; for a share of the samples it is uniform near 1. The
transformer is initialised for its depth: residual outputs are scaled by 1/sqrt(2 * 40), the output
projection is zero. The text encoder's heads initially attend backwards or forwards only, so that it
can distinguish "A left of B" from "B left of A" (docs/log.md).
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from transformers import UMT5EncoderModel

from mini.architecture import FLOW_SHIFT, Miniature
from mini.training.autocast import mixed_precision
from mini.training.dataset import WORDINGS, Corpus
from mini.training.optimizer import Optimizer, TrainingStep
from mini.training.settings import DenoiserSettings

LONG_TEXT_TOKENS = 512
# Added to a head's attention logits in the direction that it initially does not attend to.
DIRECTION_BIAS = -4.0
LOG_EVERY = 500
Report = Callable[[str, dict[str, float]], None]


def initialise(transformer: WanTransformer3DModel) -> None:
    """Initialise with Xavier weights, small residual outputs and a zero output projection."""
    for module in transformer.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    residual = 1 / math.sqrt(2 * len(transformer.blocks))
    with torch.no_grad():
        for block in transformer.blocks:
            for linear in (block.attn1.to_out[0], block.attn2.to_out[0], block.ffn.net[2]):
                linear.weight.mul_(residual)
    nn.init.zeros_(transformer.proj_out.weight)
    nn.init.zeros_(transformer.proj_out.bias)


def bias_heads_by_direction(encoder: UMT5EncoderModel) -> None:
    """Make even heads of every layer initially attend backwards and odd ones forwards.

    UMT5 gets the order of words from its relative position biases only, which start near zero. The
    thing that a relation word refers to is the exclusive or of the word and the order. From such a
    start neither helps without the other, and training never learned them.
    """
    with torch.no_grad():
        for block in encoder.encoder.block:
            bias = block.layer[0].SelfAttention.relative_attention_bias.weight
            ahead = (
                bias.shape[0] // 2
            )  # the first half of the buckets is for the same and earlier positions
            bias[ahead:, 0::2] += DIRECTION_BIAS
            bias[:ahead, 1::2] += DIRECTION_BIAS


def draw_sigma(count: int, settings: DenoiserSettings, device: torch.device) -> Tensor:
    """Draw [count] noise levels in 0..1. Can be captured in a CUDA graph."""
    sigma = torch.sigmoid(torch.randn(count, device=device))
    sigma = FLOW_SHIFT * sigma / (1 + (FLOW_SHIFT - 1) * sigma)
    noisy = 1 - (1 - settings.noisy_from) * torch.rand(count, device=device)
    return torch.where(torch.rand(count, device=device) < settings.noisy_share, noisy, sigma)


def encode_text(encoder: UMT5EncoderModel, tokens: Tensor) -> Tensor:
    """Encode text as the pipeline does, with zeros after the end: [B, T, text width].

    The attention mask is built here in four dimensions, because transformers' own builder copies it
    to the host, which is not possible in a captured graph.

    Args:
        tokens: [B, T] integers; 0 is padding.
    """
    is_token = tokens != 0
    lowest = torch.finfo(torch.float32).min
    mask = torch.where(is_token, 0.0, lowest)[:, None, None, :]
    embedded: Tensor = encoder(tokens.long(), attention_mask=mask).last_hidden_state
    return embedded * is_token.unsqueeze(-1)


class DenoiserTraining:
    """The training of transformer and text encoder, with their optimizer."""

    def __init__(self, model: Miniature, corpus: Corpus, settings: DenoiserSettings) -> None:
        self.model, self.corpus, self.settings = model, corpus, settings
        device = corpus.latents.device
        self._tokens = torch.zeros(
            settings.batch, corpus.tokens.shape[2], dtype=torch.int16, device=device
        )
        self._scene_index = torch.zeros(settings.batch, dtype=torch.long, device=device)
        self._wording_index = torch.zeros(settings.batch, dtype=torch.long, device=device)
        parameters = [*model.transformer.parameters(), *model.text_encoder.parameters()]
        self.optimizer = Optimizer(parameters, settings.peak_lr, settings.seconds)
        self._steps: dict[int, TrainingStep] = {}
        self._rng = random.Random(settings.seed)
        if device.type == "cuda":
            model.transformer.compile_repeated_blocks(fullgraph=True)

    def prepare(self) -> None:
        """Compile and capture the steps; this does not count as training time.

        Call it before a checkpoint is restored, because the capture runs a few steps at a learning
        rate of 0, which change the optimizer's moments.
        """
        for text_tokens in (self.corpus.tokens.shape[2], LONG_TEXT_TOKENS):
            self._step(text_tokens)

    def run(self, until: float, report: Report) -> float:
        """Train until a share `until` (0..1) of the time is spent; return the share reached."""
        progress, logged_at, steps = 0.0, time.monotonic(), 0
        self.optimizer.resume()
        while progress < until:
            long_text = self._rng.random() < self.settings.long_text_share
            step = self._step(LONG_TEXT_TOKENS if long_text else self.corpus.tokens.shape[2])
            self._scene_index.random_(self.corpus.latents.shape[0])
            self._wording_index.random_(WORDINGS)
            progress = self.optimizer.tick()
            step()
            steps += 1
            if self.optimizer.steps % LOG_EVERY == 0 or progress >= until:
                figures = {"steps": float(self.optimizer.steps), "loss": step.loss.item()}
                figures["step_ms"] = 1000 * (time.monotonic() - logged_at) / steps
                figures["spent_s"] = self.optimizer.spent_s
                report("denoiser", figures)
                logged_at, steps = time.monotonic(), 0
        self.optimizer.pause()
        return progress

    def _step(self, text_tokens: int) -> TrainingStep:
        if text_tokens not in self._steps:
            self._steps[text_tokens] = TrainingStep(lambda: self._loss(text_tokens), self.optimizer)
        return self._steps[text_tokens]

    def _loss(self, text_tokens: int) -> Tensor:
        clean = self.corpus.latents[self._scene_index].float()
        tokens = self.corpus.tokens[self._scene_index, self._wording_index]
        count, device = clean.shape[0], clean.device
        dropped = torch.rand(count, 1, device=device) < self.settings.prompt_dropout
        tokens = torch.where(dropped, self.corpus.empty, tokens)
        sigma = draw_sigma(count, self.settings, device)
        noise = torch.randn_like(clean)
        mixed = torch.lerp(clean, noise, sigma.view(-1, 1, 1, 1, 1))
        with mixed_precision(device):
            text = encode_text(self.model.text_encoder, tokens)
            text = F.pad(text, (0, 0, 0, text_tokens - text.shape[1]))
            predicted = self.model.transformer(mixed, sigma * 1000, text, return_dict=False)[0]
        return F.mse_loss(predicted.float(), noise - clean)
