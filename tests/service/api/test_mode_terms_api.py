"""Test that every route follows a mode's own bounds and defaults."""

from typing import Any

import pytest
from fastapi.testclient import TestClient
from redis import Redis

from jobs import catalog
from jobs.catalog import ModeOffer, WorkerOffer

TERMS: dict[str, Any] = {
    "min_steps": 4,
    "max_steps": 8,
    "default_steps": 4,
    "max_guidance_scale": 1.0,
    "default_guidance_scale": 1.0,
}
USUAL = {
    "min_steps": 1,
    "max_steps": 50,
    "default_steps": 20,
    "max_guidance_scale": 20.0,
    "default_guidance_scale": 4.0,
}


@pytest.fixture(autouse=True)
def fast(redis: Redis, offer: WorkerOffer) -> WorkerOffer:
    """A live worker with a mode of few steps."""
    modes = (*offer.modes, ModeOffer(name="fast", description="distilled", **TERMS))
    queue = catalog.queue_name(offer.model, modes)
    live = offer.model_copy(update={"modes": modes, "queue": queue})
    catalog.publish(redis, live)
    return live


def test_models_are_listed_with_the_terms_of_each_mode(client: TestClient) -> None:
    modes = {each["name"]: each for each in client.get("/models").json()["models"][0]["modes"]}
    assert TERMS.items() <= modes["fast"].items()
    assert USUAL.items() <= modes["bf16"].items()
    of_openai = {each["mode"]: each for each in client.get("/v1/models").json()["data"]}
    assert TERMS.items() <= of_openai["fast"].items()
    assert USUAL.items() <= of_openai["w8a8"].items()


def test_a_job_has_the_defaults_of_its_mode(client: TestClient) -> None:
    body = {"prompt": "a circle", "mode": "fast"}
    job = client.post("/generate", json=body).json()
    asked = job["request"]
    assert (asked["num_inference_steps"], asked["guidance_scale"]) == (4, 1.0)
    assert (asked["negative_prompt"], job["notes"]) == ("", [])
    noted = client.post("/generate", json=body | {"negative_prompt": "grey"}).json()["notes"]
    assert "negative_prompt has no effect" in noted[0]
    video = client.post("/v1/videos", json={"prompt": "a circle", "model": "fast"}).json()
    assert (video["num_inference_steps"], video["guidance_scale"]) == (4, 1.0)


def test_a_refusal_names_the_mode_and_its_bound(client: TestClient) -> None:
    body = {"prompt": "a circle", "num_inference_steps": 20, "guidance_scale": 4}
    answer = client.post("/generate", json=body | {"mode": "fast"})
    assert answer.status_code == 422
    bounds = {each["field"]: each["bound"] for each in answer.json()["errors"]}
    assert bounds == {
        "num_inference_steps": "4 to 8 in mode fast",
        "guidance_scale": "1 in mode fast",
    }
    answer = client.post("/v1/videos", json=body | {"model": "wan-mini:fast"})
    assert answer.status_code == 400
    assert "4 to 8 in mode fast" in answer.json()["error"]["message"]
    for mode in ("bf16", "w8a8"):
        assert client.post("/generate", json=body | {"mode": mode}).status_code == 202
