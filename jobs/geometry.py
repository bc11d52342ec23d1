"""Compute how a video's size and frames map to latents and transformer tokens.

The VAE reduces each side by 8, and the transformer takes latent patches of 2x2: one token covers
16x16 pixels of one latent frame. The VAE packs four frames into one latent frame, after a first
frame that has a latent frame of its own. So sides are multiples of 16 px, and counts of frames have
the form 4k+1.
"""

from typing import Final

SIZE_MULTIPLE_PX: Final = 16
"""One token covers 16x16 pixels: the VAE's stride of 8 times the transformer's patch of 2."""

FRAME_STRIDE: Final = 4
"""Frames in each latent frame after the first."""


def parse_size(size: str) -> tuple[int, int]:
    """Read "WxH" as (width, height) in pixels."""
    width, height = size.split("x")
    return int(width), int(height)


def is_frame_count(num_frames: int) -> bool:
    """Return whether a number has the form 4k+1."""
    return num_frames % FRAME_STRIDE == 1


def latent_frames(num_frames: int) -> int:
    """Return the number of latent frames of a video of `num_frames` frames."""
    return 1 + (num_frames - 1) // FRAME_STRIDE


def tokens_per_frame(width: int, height: int) -> int:
    """Return the tokens of one latent frame; both sides, in pixels, are multiples of 16."""
    return (width // SIZE_MULTIPLE_PX) * (height // SIZE_MULTIPLE_PX)


def sequence_tokens(width: int, height: int, num_frames: int) -> int:
    """Return the length of the transformer's sequence for a whole video."""
    return latent_frames(num_frames) * tokens_per_frame(width, height)
