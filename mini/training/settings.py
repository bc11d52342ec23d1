"""Define the settings of a training run, stored as `training.json` with the weights."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class VaeSettings:
    """The settings of the VAE's training.

    The loss is squared error plus absolute_weight times absolute error, multiplied by
    1 + foreground_weight on the pixels of things.

    Attributes:
        pool: number of rendered clips to draw batches from.
        image_s: seconds of training on single frames.
        clip_s: seconds of training on whole clips.
        check_clips: clips of the calibration split on which the reconstruction is measured.
    """

    seed: int = 1
    pool: int = 6144
    image_s: float = 55.0
    clip_s: float = 485.0
    image_batch: int = 128
    clip_batch: int = 16
    peak_lr: float = 8.0e-4
    kl_weight: float = 1.0e-6
    foreground_weight: float = 1.0
    absolute_weight: float = 0.02
    check_clips: int = 64


@dataclass(frozen=True, slots=True)
class DenoiserSettings:
    """The settings of the training of transformer and text encoder, which are trained together.

    Attributes:
        seconds: training time.
        corpus: number of encoded scenes.
        prompt_dropout: share of empty prompts, for classifier-free guidance.
        long_text_share: share of steps whose text is padded to 512 tokens, the pipeline's default,
            instead of the miniature's 64.
        pair_share: share of scenes with two things.
        noisy_share: share of samples whose sigma is uniform from noisy_from to 1. At these noise
            levels the positions of the things are decided.
        checks: how often the oracle evaluates samples during training.
        check_prompts: number of captions of the calibration split in each check.
    """

    seed: int = 2
    seconds: float = 990.0
    corpus: int = 65_536
    batch: int = 192
    peak_lr: float = 1.2e-3
    prompt_dropout: float = 0.1
    long_text_share: float = 0.08
    pair_share: float = 0.5
    noisy_share: float = 0.3
    noisy_from: float = 0.94
    checks: int = 4
    check_prompts: int = 128


@dataclass(frozen=True, slots=True)
class TrainingSettings:
    """The settings of one run of `python -m mini train`."""

    vae: VaeSettings = field(default_factory=VaeSettings)
    denoiser: DenoiserSettings = field(default_factory=DenoiserSettings)
