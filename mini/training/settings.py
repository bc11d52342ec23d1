"""The numbers of a training run that one may want to change; `training.json` beside the weights."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class VaeSettings:
    """image_s and clip_s are seconds of training on single frames and on whole clips; check_clips
    clips of the calibration split measure the reconstruction. The loss is squared error plus
    absolute_weight times absolute error, (1 + foreground_weight) times as much on the things."""

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
    """Transformer and text encoder, trained together.

    seconds: training time. corpus: encoded scenes. long_text_share: steps whose text is padded to
    512 tokens, the pipeline's default, instead of the miniature's 64. prompt_dropout: share of
    empty prompts, for classifier-free guidance. pair_share: scenes of two things. noisy_share:
    samples whose sigma is drawn uniformly from noisy_from to 1, where it is decided which thing
    goes where. checks: how often the oracle looks at samples from check_prompts captions of the
    calibration split.
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
    """One run of `python -m mini train`."""

    vae: VaeSettings = field(default_factory=VaeSettings)
    denoiser: DenoiserSettings = field(default_factory=DenoiserSettings)
