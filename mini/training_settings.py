"""Every number a training run depends on; the run writes them into the model card."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class VaeSettings:
    """image_s and clip_s are seconds of training on single frames and on whole clips; check_clips
    clips of the evaluation split measure the reconstruction."""

    seed: int = 1
    pool: int = 6144
    image_s: float = 60.0
    clip_s: float = 480.0
    image_batch: int = 128
    clip_batch: int = 16
    peak_lr: float = 1.0e-3
    check_clips: int = 64
    channels_last: bool = True


@dataclass(frozen=True, slots=True)
class DenoiserSettings:
    """Transformer and text encoder, trained together.

    seconds: training time. corpus: encoded scenes. long_text_share: steps whose text is padded to
    512 tokens, the pipeline's default, instead of the miniature's 64. prompt_dropout: share of
    empty prompts, for classifier-free guidance. checks: how often the oracle looks at samples from
    check_prompts captions of the calibration split.
    """

    seed: int = 2
    seconds: float = 700.0
    corpus: int = 65_536
    batch: int = 192
    peak_lr: float = 1.2e-3
    prompt_dropout: float = 0.1
    long_text_share: float = 0.08
    checks: int = 4
    check_prompts: int = 64


@dataclass(frozen=True, slots=True)
class TrainingSettings:
    """One run of `python -m mini train`."""

    vae: VaeSettings = field(default_factory=VaeSettings)
    denoiser: DenoiserSettings = field(default_factory=DenoiserSettings)
