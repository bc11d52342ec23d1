"""A text is embedded once, and each job gets a copy that is its own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from jobs import durations
from jobs.errors import GenerationFailed
from jobs.record import Stage
from jobs.spec import GenerationRequest
from tests.support.job_controls import Unwatched
from tests.support.requests import OWNER, order, unseen
from worker.engine.prompt_encoder import MOST_KEPT, PromptEncoder
from worker.engine.wan_engine import WanEngine
from worker.job.progress import JobClock
from worker.process.stats import StepTimes
from worker.settings import StallLimits

RED = order(prompt="a small red circle", negative_prompt="blurry")
BLUE = order(prompt="a large blue square", negative_prompt="blurry")


class Counting(Unwatched):
    """Counts what it is told and asked."""

    def __init__(self) -> None:
        self.stages: list[Stage] = []
        self.checks = 0

    def progress(self, stage: Stage, step: int, steps: int) -> None:
        self.stages.append(stage)

    def check(self) -> None:
        self.checks += 1


@pytest.fixture
def prompts(engine: WanEngine) -> PromptEncoder:
    """One that has embedded nothing yet; every owner has the text "ugly"."""
    config = engine.config.model_copy(update={"default_negative_prompt": "ugly"})
    return PromptEncoder(engine.parts, engine.device, config)


def test_what_is_no_number_is_not_kept(prompts: PromptEncoder) -> None:
    weight = prompts._parts.text_encoder.encoder.final_layer_norm.weight
    good = weight.detach().clone()
    weight.data.fill_(torch.inf)
    try:
        with pytest.raises(GenerationFailed, match="The text encoder gave"):
            prompts.encode(RED, Unwatched(), OWNER)
    finally:
        weight.data.copy_(good)
    assert not prompts._kept
    embedding, _ = prompts.encode(RED, Unwatched(), OWNER)
    assert embedding.isfinite().all()


Embed = Callable[..., int]


@pytest.fixture
def embedded(prompts: PromptEncoder) -> Embed:
    """Embed a request's texts; how many of them went through the encoder for it."""
    layers = len(prompts._parts.text_encoder.encoder.block)

    def embed(request: GenerationRequest, owner: str = OWNER) -> int:
        watch = Counting()
        prompts.encode(request, watch, owner)
        texts, rest = divmod(watch.checks, layers)
        assert rest == 0
        assert watch.stages == [Stage.TEXT_ENCODER] * bool(texts)
        return texts

    return embed


def test_only_what_is_new_goes_through_the_encoder(
    embedded: Embed,
) -> None:
    assert embedded(RED) == 2
    assert embedded(RED.model_copy(update={"mode": "w8a8", "seed": 8})) == 0
    assert embedded(BLUE) == 1, "the negative prompt is known"
    assert embedded(order(prompt="blurry", guidance_scale=1.0)) == 0, "a text is a text"
    assert embedded(order(prompt="green", negative_prompt="green")) == 1
    assert embedded(order(prompt="grey", negative_prompt="new", guidance_scale=1.0)) == 1


def test_nobody_else_is_sooner_done_for_what_an_owner_asked(embedded: Embed) -> None:
    assert embedded(RED, "ann") == 2
    assert embedded(RED, "bob") == 2
    assert embedded(order(prompt="green", negative_prompt="ugly"), "ann") == 2
    assert embedded(order(prompt="green", negative_prompt="ugly"), "bob") == 1
    assert embedded(RED, "ann") == 0


def test_what_jobs_without_encoding_take_is_no_measure_for_those_with_it(
    engine: WanEngine,
) -> None:
    times = StepTimes()
    limits = StallLimits(floor_s=1.0, first_step_s=99.0)

    class Clocked(Unwatched):
        def __init__(self, request: GenerationRequest) -> None:
            self.clock = JobClock(request, None, times, limits)

        def progress(self, stage: Stage, step: int, steps: int) -> None:
            self.clock.at(stage, step, steps)

    short = {"num_frames": 1, "num_inference_steps": 1, "prompt": unseen()}
    engine.generate(order(**short), Clocked(order(**short)), OWNER).frames.close()
    other = order(**short, guidance_scale=1.0)
    engine.generate(other, Clocked(other), OWNER).frames.close()
    for request, known in ((order(**short), True), (other, False)):
        measured = times.median(durations.shape(request), Stage.TEXT_ENCODER)
        assert (measured is not None) is known


def test_what_is_kept_is_what_was_embedded_whatever_a_job_does_with_it(
    prompts: PromptEncoder, engine: WanEngine
) -> None:
    first = prompts.encode(RED, Unwatched(), OWNER)
    copies = [each.clone() for each in first if each is not None]
    for each in first:
        assert each is not None
        each.zero_()
    again = prompts.encode(RED, Unwatched(), OWNER)
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


def test_the_texts_that_were_used_last_are_kept(prompts: PromptEncoder, embedded: Embed) -> None:
    for number in range(MOST_KEPT + 3):
        assert embedded(order(prompt=f"circle {number}", negative_prompt="blurry")) == 1 + (
            number == 0
        )
        assert len(prompts._kept) <= MOST_KEPT
    assert embedded(order(prompt=f"circle {number}", negative_prompt="blurry")) == 0
    assert embedded(order(prompt="circle 0", negative_prompt="blurry")) == 1


class Stopping(Unwatched):
    """Stops at a check."""

    def __init__(self, checks: int) -> None:
        self.left = checks

    def check(self) -> None:
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1


def test_a_job_that_stops_in_a_text_keeps_only_whole_ones(
    prompts: PromptEncoder, embedded: Embed
) -> None:
    layers = len(prompts._parts.text_encoder.encoder.block)
    with pytest.raises(KeyboardInterrupt):
        prompts.encode(RED, Stopping(layers + 1), OWNER)
    assert len(prompts._kept) == 1
    assert embedded(RED) == 1
    assert embedded(RED) == 0


def test_texts_are_not_kept(prompts: PromptEncoder) -> None:
    prompts.encode(RED, Unwatched(), OWNER)
    kept = repr(prompts._kept)
    assert "tests" in kept, "the owner"
    assert "circle" not in kept
    assert "blurry" not in kept
