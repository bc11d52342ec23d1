"""A text is embedded once, and each job gets a copy that is its own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from jobs.spec import GenerationRequest
from tests.worker.orders import order
from worker.prompts import MOST_KEPT, PromptEncoder
from worker.wan import WanEngine

RED = order(prompt="a small red circle", negative_prompt="blurry")
BLUE = order(prompt="a large blue square", negative_prompt="blurry")


@pytest.fixture
def prompts(engine: WanEngine) -> PromptEncoder:
    """One that has embedded nothing yet."""
    return PromptEncoder(engine.parts, engine.device, engine.config.text_tokens)


@pytest.fixture
def embedded(prompts: PromptEncoder) -> Callable[[GenerationRequest], int]:
    """Embed a request's texts; how many of them went through the encoder for it."""
    layers = len(prompts._parts.text_encoder.encoder.block)

    def embed(request: GenerationRequest) -> int:
        checks: list[None] = []
        prompts.encode(request, lambda: checks.append(None))
        texts, rest = divmod(len(checks), layers)
        assert rest == 0
        return texts

    return embed


def test_only_what_is_new_goes_through_the_encoder(
    embedded: Callable[[GenerationRequest], int],
) -> None:
    assert embedded(RED) == 2
    assert embedded(RED.model_copy(update={"mode": "w8a8", "seed": 8})) == 0
    assert embedded(BLUE) == 1, "the negative prompt is known"
    assert embedded(order(prompt="blurry", guidance_scale=1.0)) == 0, "a text is a text"
    assert embedded(order(prompt="green", negative_prompt="green")) == 1
    assert embedded(order(prompt="grey", negative_prompt="new", guidance_scale=1.0)) == 1


def test_what_is_kept_is_what_was_embedded_whatever_a_job_does_with_it(
    prompts: PromptEncoder, engine: WanEngine
) -> None:
    first = prompts.encode(RED, lambda: None)
    copies = [each.clone() for each in first if each is not None]
    for each in first:
        assert each is not None
        each.zero_()
    again = prompts.encode(RED, lambda: None)
    with torch.no_grad():
        whole = prompts._pipeline.encode_prompt(
            prompt=RED.prompt,
            negative_prompt=RED.negative_prompt,
            max_sequence_length=engine.config.text_tokens,
            device=engine.device.torch_device,
            dtype=engine.device.dtype,
        )
    for ours, before, theirs in zip(again, copies, whole, strict=True):
        assert ours is not None
        assert torch.equal(ours, before)
        assert torch.equal(ours, theirs)


def test_the_texts_that_were_used_last_are_kept(
    prompts: PromptEncoder, embedded: Callable[[GenerationRequest], int]
) -> None:
    for number in range(MOST_KEPT + 3):
        assert embedded(order(prompt=f"circle {number}", negative_prompt="blurry")) == 1 + (
            number == 0
        )
        assert len(prompts._kept) <= MOST_KEPT
    assert embedded(order(prompt=f"circle {number}", negative_prompt="blurry")) == 0
    assert embedded(order(prompt="circle 0", negative_prompt="blurry")) == 1


def test_a_job_that_stops_in_a_text_keeps_only_whole_ones(
    prompts: PromptEncoder, embedded: Callable[[GenerationRequest], int]
) -> None:
    left = len(prompts._parts.text_encoder.encoder.block) + 1

    def stop_in_the_second() -> None:
        nonlocal left
        if not left:
            raise KeyboardInterrupt
        left -= 1

    with pytest.raises(KeyboardInterrupt):
        prompts.encode(RED, stop_in_the_second)
    assert list(prompts._kept) == [RED.prompt]
    assert embedded(RED) == 1
