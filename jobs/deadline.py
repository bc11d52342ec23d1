"""How long a job may run before RQ stops it.

The rule is generous on purpose: it ends a job that would otherwise never end, and leaves slow
devices alone. (A hung device is noticed much earlier, by the worker itself.)

    timeout = 600 s + steps x (5 s + 4 ms x tokens)

where tokens = width/16 x height/16 x (1 + (frames-1)/4) is the length of the transformer's
sequence. For 832x480, 81 frames and 50 steps that is two hours; the slowest published figure for
the 14B model on one card (Ascend 910B, BF16) is 860 s.
"""

from jobs.spec import FRAME_STRIDE, GenerationRequest

BASE_S = 600
STEP_S = 5.0
TOKEN_S = 0.004
PATCH_PX = 16
"""One token covers 16x16 pixels: the VAE's stride of 8 times the transformer's patch of 2."""


def timeout_s(request: GenerationRequest) -> int:
    """Return the job's time limit in whole seconds."""
    frames = 1 + (request.num_frames - 1) // FRAME_STRIDE
    tokens = (request.width / PATCH_PX) * (request.height / PATCH_PX) * frames
    return round(BASE_S + request.num_inference_steps * (STEP_S + TOKEN_S * tokens))
