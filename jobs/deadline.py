"""How long one attempt at a job may take before its worker stops it.

The rule is generous on purpose: it ends an attempt that would otherwise never end, and leaves slow
devices alone. (A hung device is noticed much earlier, by the worker itself.)

    timeout = 600 s + steps x (5 s + 4 ms x tokens)

where tokens = width/16 x height/16 x (1 + (frames-1)/4) is the length of the transformer's
sequence. For 832x480, 81 frames and 50 steps that is two hours; the slowest published figure for
the 14B model on one card (Ascend 910B, BF16) is 860 s. Where jobs of the same shape were measured
to be so slow that this is less than ten times what they take, it is ten times what they take: a
job that runs as its kind does is never stopped.
"""

import math

from jobs.pace import Pace
from jobs.spec import FRAME_STRIDE, GenerationRequest

BASE_S = 600
STEP_S = 5.0
TOKEN_S = 0.004
PATCH_PX = 16
"""One token covers 16x16 pixels: the VAE's stride of 8 times the transformer's patch of 2."""

SLACK = 10
"""At least this many times the measured duration."""


def timeout_s(request: GenerationRequest, pace: Pace | None = None) -> int:
    """Return the limit in whole seconds; `pace` is that of the request's shape, if measured."""
    frames = 1 + (request.num_frames - 1) // FRAME_STRIDE
    tokens = (request.width / PATCH_PX) * (request.height / PATCH_PX) * frames
    limit = BASE_S + request.num_inference_steps * (STEP_S + TOKEN_S * tokens)
    if pace is not None:
        limit = max(limit, SLACK * pace.job_s(request.num_inference_steps))
    return math.ceil(limit)
