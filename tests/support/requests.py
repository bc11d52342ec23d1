"""Build generation requests for tests of the worker."""

import secrets

from jobs.spec import GenerationRequest

OWNER = "tests"


def generation_request(**changes: object) -> GenerationRequest:
    """Build a short request, with `changes` to its fields; four steps are enough for all tests."""
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


def unique_prompt() -> str:
    """Return a prompt that no engine has encoded yet."""
    return f"a small red circle, {secrets.token_hex(8)}"
