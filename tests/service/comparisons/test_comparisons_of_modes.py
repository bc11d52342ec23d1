"""Test comparisons of modes that have different bounds and defaults."""

from typing import Any

import pytest
from redis import Redis

from jobs import catalog
from jobs.catalog import Catalog, ModeOffer, WorkerOffer
from jobs.errors import InvalidSpec
from jobs.spec import resolve
from service.comparisons.creation import plan
from service.comparisons.model import Arm, Comparison, Contender
from service.comparisons.pair_jobs import Planned, body_of

SETTINGS = ("num_inference_steps", "guidance_scale", "negative_prompt")


@pytest.fixture
def served(redis: Redis, offer: WorkerOffer) -> Catalog:
    terms: dict[str, Any] = {"max_steps": 8, "default_steps": 4}
    terms |= {"max_guidance_scale": 1.0, "default_guidance_scale": 1.0}
    modes = (*offer.modes, ModeOffer(name="fast", description="distilled", **terms))
    catalog.publish(redis, offer.model_copy(update={"modes": modes}))
    return catalog.read(redis)


def planned(served: Catalog, reference: str, candidate: str, **settings: object) -> Planned:
    body = {
        "title": "Is it as good?",
        "reference": {"mode": reference},
        "candidate": {"mode": candidate},
        "prompts": ["a red circle"],
        "settings": settings,
    }
    return plan(body, "ops", served)


def halves(served: Catalog, made: Planned) -> dict[str, tuple[object, ...]]:
    """What is run of each arm of the first pair."""
    bodies = {arm: body_of(made.comparison, made.pairs[0], arm) for arm in Arm}
    requests = {arm: resolve(body, served)[0] for arm, body in bodies.items()}
    assert len({request.seed for request in requests.values()}) == 1
    return {
        request.mode: tuple(getattr(request, name) for name in SETTINGS)
        for request in requests.values()
    }


@pytest.mark.parametrize(("reference", "candidate"), [("bf16", "fast"), ("fast", "bf16")])
def test_each_mode_has_its_own_steps_and_guidance(
    served: Catalog, reference: str, candidate: str
) -> None:
    made = planned(served, reference, candidate, num_frames=5)
    assert halves(served, made) == {"bf16": (20, 4.0, "blurry"), "fast": (4, 1.0, "")}
    stored = Comparison.model_validate_json(made.comparison.model_dump_json())
    assert stored.candidate == made.comparison.candidate
    assert stored.reference == Contender(mode=reference, model="wan-mini")


def test_what_is_given_holds_for_both(served: Catalog) -> None:
    made = planned(served, "bf16", "fast", num_inference_steps=8)
    assert halves(served, made) == {"bf16": (8, 4.0, "blurry"), "fast": (8, 1.0, "")}
    with pytest.raises(InvalidSpec) as refused:
        planned(served, "bf16", "fast", num_inference_steps=20, guidance_scale=4.0)
    found = {each.field: each.detail for each in refused.value.violations}
    assert (
        "candidate: num_inference_steps is 20, which is not 1 to 8 in mode fast"
        in (found["settings.num_inference_steps"])
    )
    assert "1 in mode fast" in found["settings.guidance_scale"]


def test_a_comparison_of_before_has_one_setting_for_both(served: Catalog) -> None:
    made = planned(served, "bf16", "w8a8")
    data = made.comparison.model_dump()
    for arm in Arm:
        data[arm] = {name: data[arm][name] for name in ("mode", "model")}
    older = Comparison.model_validate(data)
    assert older == made.comparison
    assert set(halves(served, Planned(older, made.pairs)).values()) == {(20, 4.0, "blurry")}
