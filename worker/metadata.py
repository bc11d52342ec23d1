"""What made a video, for its metadata: whoever knows the prompt can make it again."""

from __future__ import annotations

import hashlib

from jobs.record import JobRecord
from worker.engine import Engine


def video_facts(engine: Engine, record: JobRecord) -> dict[str, object]:
    """Name the job, the model, the mode and every setting; of the prompts only the hashes."""
    request = record.request
    modes = {mode.name: mode for mode in engine.modes}
    return {
        "job_id": record.id,
        "prompt_sha256": hashlib.sha256(request.prompt.encode()).hexdigest(),
        "negative_prompt_sha256": hashlib.sha256(request.negative_prompt.encode()).hexdigest(),
        "model": request.model,
        "model_fingerprint": engine.model.fingerprint,
        "mode": request.mode,
        "recipe_fingerprint": modes[request.mode].recipe_fingerprint,
        "variant": modes[request.mode].variant,
        "seed": request.seed,
        "num_inference_steps": request.num_inference_steps,
        "guidance_scale": request.guidance_scale,
    }
