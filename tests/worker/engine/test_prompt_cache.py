"""Test that a text is encoded once, and that each job gets its own copy."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from jobs import durations
from jobs.errors import GenerationFailed
from jobs.record import Stage
from jobs.spec import GenerationRequest
from tests.support.job_controls import IgnoringControl
from tests.support.requests import OWNER, generation_request, unique_prompt
from worker.engine.prompt_encoder import MAX_CACHED, PromptEncoder
from worker.engine.wan_engine import WanEngine
from worker.job.progress import JobClock
from worker.process.stats import StepTimes
from worker.settings import StallLimits

RED = generation_request(prompt="a small red circle", negative_prompt="blurry")
BLUE = generation_request(prompt="a large blue square", negative_prompt="blurry")


class CountingControl(IgnoringControl):
    """A control that counts checks and records stages."""

    def __init__(self) -> None:
        self.stages: list[Stage] = []
        self.checks = 0

    def progress(self, stage: Stage, step: int, steps: int) -> None:
        self.stages.append(stage)

    def check(self) -> None:
        self.checks += 1


@pytest.fixture
def prompts(engine: WanEngine) -> PromptEncoder:
    """An encoder with an empty cache; all owners share the text "ugly"."""
    config = engine.config.model_copy(update={"default_negative_prompt": "ugly"})
    return PromptEncoder(engine.components, engine.device, config)


def test_nan_is_not_cached(prompts: PromptEncoder) -> None:
    weight = prompts._components.text_encoder.encoder.final_layer_norm.weight
    good = weight.detach().clone()
    weight.data.fill_(torch.inf)
    try:
        with pytest.raises(GenerationFailed, match="The text encoder gave"):
            prompts.encode(RED, IgnoringControl(), OWNER)
    finally:
        weight.data.copy_(good)
    assert not prompts._cache
    embedding, _ = prompts.encode(RED, IgnoringControl(), OWNER)
    assert embedding.isfinite().all()


Embed = Callable[..., int]


@pytest.fixture
def embedded(prompts: PromptEncoder) -> Embed:
    """Encode a request's texts; return how many of them went through the encoder."""
    layers = len(prompts._components.text_encoder.encoder.block)

    def embed(request: GenerationRequest, owner: str = OWNER) -> int:
        control = CountingControl()
        prompts.encode(request, control, owner)
        texts, rest = divmod(control.checks, layers)
        assert rest == 0
        assert control.stages == [Stage.TEXT_ENCODER] * bool(texts)
        return texts

    return embed


def test_only_what_is_new_goes_through_the_encoder(
    embedded: Embed,
) -> None:
    assert embedded(RED) == 2
    assert embedded(RED.model_copy(update={"mode": "w8a8", "seed": 8})) == 0
    assert embedded(BLUE) == 1, "the negative prompt is cached"
    assert embedded(generation_request(prompt="blurry", guidance_scale=1.0)) == 0, (
        "the role of a text does not matter"
    )
    assert embedded(generation_request(prompt="green", negative_prompt="green")) == 1
    assert (
        embedded(generation_request(prompt="grey", negative_prompt="new", guidance_scale=1.0)) == 1
    )


def test_no_owner_gets_the_cached_texts_of_another(embedded: Embed) -> None:
    assert embedded(RED, "ann") == 2
    assert embedded(RED, "bob") == 2
    assert embedded(generation_request(prompt="green", negative_prompt="ugly"), "ann") == 2
    assert embedded(generation_request(prompt="green", negative_prompt="ugly"), "bob") == 1
    assert embedded(RED, "ann") == 0


def test_jobs_without_encoding_do_not_change_the_measured_encoding_time(
    engine: WanEngine,
) -> None:
    times = StepTimes()
    limits = StallLimits(floor_s=1.0, first_step_s=99.0)

    class ClockedControl(IgnoringControl):
        def __init__(self, request: GenerationRequest) -> None:
            self.clock = JobClock(request, None, times, limits)

        def progress(self, stage: Stage, step: int, steps: int) -> None:
            self.clock.update(stage, step, steps)

    short = {"num_frames": 1, "num_inference_steps": 1, "prompt": unique_prompt()}
    engine.generate(
        generation_request(**short), ClockedControl(generation_request(**short)), OWNER
    ).frames.close()
    other = generation_request(**short, guidance_scale=1.0)
    engine.generate(other, ClockedControl(other), OWNER).frames.close()
    for request, known in ((generation_request(**short), True), (other, False)):
        measured = times.median(durations.shape(request), Stage.TEXT_ENCODER)
        assert (measured is not None) is known


def test_a_job_cannot_change_the_cached_embeddings(
    prompts: PromptEncoder, engine: WanEngine
) -> None:
    first = prompts.encode(RED, IgnoringControl(), OWNER)
    copies = [each.clone() for each in first if each is not None]
    for each in first:
        assert each is not None
        each.zero_()
    again = prompts.encode(RED, IgnoringControl(), OWNER)
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


def test_the_latest_texts_are_cached(prompts: PromptEncoder, embedded: Embed) -> None:
    for number in range(MAX_CACHED + 3):
        assert embedded(
            generation_request(prompt=f"circle {number}", negative_prompt="blurry")
        ) == 1 + (number == 0)
        assert len(prompts._cache) <= MAX_CACHED
    assert embedded(generation_request(prompt=f"circle {number}", negative_prompt="blurry")) == 0
    assert embedded(generation_request(prompt="circle 0", negative_prompt="blurry")) == 1


class StoppingControl(IgnoringControl):
    """A control that stops the job at a check."""

    def __init__(self, checks: int) -> None:
        self.remaining = checks

    def check(self) -> None:
        if not self.remaining:
            raise KeyboardInterrupt
        self.remaining -= 1


def test_a_job_that_stops_within_a_text_caches_only_complete_ones(
    prompts: PromptEncoder, embedded: Embed
) -> None:
    layers = len(prompts._components.text_encoder.encoder.block)
    with pytest.raises(KeyboardInterrupt):
        prompts.encode(RED, StoppingControl(layers + 1), OWNER)
    assert len(prompts._cache) == 1
    assert embedded(RED) == 1
    assert embedded(RED) == 0


def test_texts_themselves_are_not_cached(prompts: PromptEncoder) -> None:
    prompts.encode(RED, IgnoringControl(), OWNER)
    cached = repr(prompts._cache)
    assert "tests" in cached, "the owner"
    assert "circle" not in cached
    assert "blurry" not in cached
