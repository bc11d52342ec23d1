"""Test that a mode's own bounds and defaults hold, and that what it lacks is the model's."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from redis import Redis

from jobs import catalog, durations
from jobs.catalog import Catalog, ModelOffer, ModeOffer, OwnTerms, Terms, WorkerOffer
from jobs.durations import Durations
from jobs.errors import InvalidSpec, ModeNotServed
from jobs.spec import GenerationRequest, resolve_json

FEW = {"min_steps": 2, "max_steps": 8, "default_steps": 4}
UNGUIDED = {"max_guidance_scale": 1.0, "default_guidance_scale": 1.0}
FAST = ModeOffer(name="fast", description="distilled", **FEW | UNGUIDED)
OLDER = Path(__file__).parent / "upgrade" / "older-records.json"


@pytest.fixture
def three(offer: WorkerOffer) -> WorkerOffer:
    """The worker with a third mode."""
    modes = (*offer.modes, FAST)
    queue = catalog.queue_name(offer.model, modes)
    return offer.model_copy(update={"modes": modes, "queue": queue})


def resolved(*offers: WorkerOffer, **body: object) -> GenerationRequest:
    known = frozenset((offer.model.name, mode.name) for offer in offers for mode in offer.modes)
    waiting = dict.fromkeys((offer.queue for offer in offers), 0)
    served = Catalog(offers=offers, waiting=waiting, known=known)
    return resolve_json({"prompt": "a circle", "seed": 7} | body, served)[0]


def refusals(offer: WorkerOffer, **body: object) -> dict[str, str]:
    with pytest.raises(InvalidSpec) as refused:
        resolved(offer, **body)
    return {each.field: each.detail for each in refused.value.violations}


def test_defaults_come_from_the_mode(three: WorkerOffer) -> None:
    fast, bf16 = resolved(three, mode="fast"), resolved(three, mode="bf16")
    assert (fast.num_inference_steps, fast.guidance_scale, fast.negative_prompt) == (4, 1.0, "")
    assert (bf16.num_inference_steps, bf16.guidance_scale, bf16.negative_prompt) == (
        20,
        4.0,
        "blurry",
    )
    by_default = three.model.model_copy(update={"default_mode": "fast"})
    unnamed = resolved(three.model_copy(update={"model": by_default}))
    assert (unnamed.mode, unnamed.num_inference_steps) == ("fast", 4)


def test_bounds_are_the_modes_and_named_with_it(three: WorkerOffer) -> None:
    outside = {"num_inference_steps": 20, "guidance_scale": 4.0}
    assert refusals(three, mode="fast", **outside) == {
        "num_inference_steps": "num_inference_steps is 20, which is not 2 to 8 in mode fast; leave "
        "it out for the mode's own.",
        "guidance_scale": "guidance_scale is 4.0, which is not 1 in mode fast; leave it out for "
        "the mode's own.",
    }
    assert refusals(three, mode="fast", num_inference_steps=1).keys() == {"num_inference_steps"}
    for steps in (2, 8):
        request = resolved(three, mode="fast", num_inference_steps=steps, guidance_scale=1)
        assert request.num_inference_steps == steps
    assert resolved(three, mode="bf16", **outside).guidance_scale == 4.0
    assert "which is not 1 to 50." in str(refusals(three, num_inference_steps=51))


def test_a_bound_of_a_mode_may_be_wider_than_the_models(offer: WorkerOffer) -> None:
    patient = FAST.model_copy(update={"name": "patient", "min_steps": None, "max_steps": 100})
    wide = offer.model_copy(update={"modes": (*offer.modes, patient)})
    assert resolved(wide, mode="patient", num_inference_steps=100).num_inference_steps == 100


@pytest.mark.parametrize("first", ["fast", "bf16"])
def test_workers_of_one_queue_may_differ_in_the_mode_that_is_not_named(
    three: WorkerOffer, first: str
) -> None:
    """As while `default_mode` is changed, worker by worker."""
    second = "bf16" if first == "fast" else "fast"
    offers = [
        three.model_copy(update={"model": three.model.model_copy(update={"default_mode": mode})})
        for mode in (first, second)
    ]
    assert resolved(*offers, num_inference_steps=50).mode == "bf16"
    assert resolved(*offers, guidance_scale=4.0).mode == "bf16"


def test_bounds_of_a_mode_that_is_away_are_not_known(three: WorkerOffer) -> None:
    known = frozenset({("wan-mini", mode) for mode in ("bf16", "w8a8", "fast", "many")})
    away = Catalog(offers=(three,), waiting={three.queue: 0}, known=known)
    with pytest.raises(ModeNotServed):
        resolve_json({"prompt": "a", "mode": "many", "num_inference_steps": 80}, away)


def test_estimates_are_the_modes(redis: Redis, three: WorkerOffer) -> None:
    fast, bf16 = resolved(three, mode="fast"), resolved(three, mode="bf16")
    durations.measure(redis, fast, Durations(step_s=0.5, rest_s=1))
    assert durations.read(redis, bf16) is None
    read = durations.read(redis, resolved(three, mode="fast", num_inference_steps=8))
    assert read is not None
    assert read.job_s(8) == 5


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"min_steps": 9, "max_steps": 8, "default_steps": 8}, "min_steps 9 is more than max_st"),
        ({"max_steps": 8}, r"default_steps 20 is not in 1\.\.8"),
        ({"min_steps": 21}, r"default_steps 20 is not in 21\.\.50"),
        ({"default_steps": 51}, r"default_steps 51 is not in 1\.\.50"),
        ({"max_guidance_scale": 1.0}, r"default_guidance_scale 4 is not in 1\.\.1"),
        ({"default_guidance_scale": 6.0, "max_guidance_scale": 5.0}, r"6 is not in 1\.\.5"),
    ],
)
def test_terms_that_contradict_each_other_are_refused(
    offer: WorkerOffer, own: dict[str, Any], message: str
) -> None:
    wrong = ModeOffer(name="wrong", description="d", **own)
    with pytest.raises(ValueError, match=message):
        offer.model.terms(wrong)
    changed = offer.model_dump() | {"modes": [*offer.model_dump()["modes"], wrong.model_dump()]}
    with pytest.raises(ValidationError, match=message):
        WorkerOffer.model_validate(changed)


@pytest.mark.parametrize(
    "own", [{"min_steps": 0}, {"max_guidance_scale": 0.5}, {"default_guidance_scale": 21.0}]
)
def test_terms_are_numbers_that_a_request_may_have(own: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(own))):
        OwnTerms(**own)


def test_the_queue_depends_on_a_modes_bounds_and_not_on_its_defaults(
    offer: WorkerOffer, model: ModelOffer
) -> None:
    """A job that was checked by one bound never reaches a worker with another."""
    first, *others = offer.modes

    def name(**own: Any) -> str:
        return catalog.queue_name(model, [first.model_copy(update=own), *others])

    assert name(default_steps=4, default_guidance_scale=1.0) == offer.queue
    bounds = ({"min_steps": 4}, {"max_steps": 4}, {"max_guidance_scale": 1.0})
    assert len({offer.queue, *(name(**own) for own in bounds)}) == 4


def test_offers_of_the_release_before_have_the_models_terms(redis: Redis) -> None:
    kept = json.loads(OLDER.read_text(encoding="utf-8"))["keys"]
    offers = (
        json.loads(each["value"]) for key, each in kept.items() if key.startswith("wan:worker:")
    )
    texts = [json.dumps(each) for each in offers if "queue" in each]
    assert texts
    for text in texts:
        redis.set("offer", text)
        (offer,) = catalog.readable(redis, WorkerOffer, "offer", ["w"], ["offer"])
        usual = Terms(max_steps=50, default_steps=20, default_guidance_scale=4.0)
        assert [offer.terms(mode.name) for mode in offer.modes] == [usual, usual]
        assert offer.queue == catalog.queue_name(offer.model, offer.modes)
