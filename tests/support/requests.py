"""Requests for the worker's tests, and a watch for those that run an engine by itself."""

import secrets

from jobs.spec import GenerationRequest

OWNER = "tests"


def order(**changes: object) -> GenerationRequest:
    """A short one: four steps are enough for everything but a good picture."""
    values: dict[str, object] = {
        "prompt": "a small red circle moving right on a black background",
        "negative_prompt": "",
        "mode": "bf16",
        "size": "96x96",
        "num_frames": 17,
        "num_inference_steps": 4,
        "guidance_scale": 3.0,
        "seed": 7,
        "model": "wan-mini",
    }
    return GenerationRequest.model_validate(values | changes)


def unseen() -> str:
    """A prompt that no engine has encoded yet."""
    return f"a small red circle, {secrets.token_hex(8)}"
