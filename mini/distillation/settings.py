"""Define the settings of a distillation, which its results keep, and its error."""

from __future__ import annotations

from dataclasses import dataclass

from mini.evaluate import GUIDANCE_SCALE


class DistillError(Exception):
    """Why a distillation cannot begin or go on, as a sentence with a remedy."""


@dataclass(frozen=True, slots=True)
class DistillSettings:
    """What a distillation does. Defaults are meant for a GPU.

    Attributes:
        steps: of the optimizer, over all rounds.
        batch: samples of a step; trajectories are recorded as many at a time.
        rounds: of recording. The first one follows the teacher, later ones the student.
        trajectories: recorded in each round.
        teacher_steps: of the teacher's solver from one of the student's noise levels to the next;
            each takes two guided evaluations.
        student_steps: of the sampler that the LoRA is for.
        guidance_scale: of the teacher.
        learning_rate: after the warm-up; it falls to zero along a cosine.
        seed: of captions, noise, order and first weights.
    """

    steps: int = 6000
    batch: int = 256
    rounds: int = 4
    trajectories: int = 4096
    teacher_steps: int = 4
    student_steps: int = 4
    guidance_scale: float = GUIDANCE_SCALE
    rank: int = 7
    learning_rate: float = 1.0e-3
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse rounds that would be recorded but never trained on.

        Raises:
            DistillError: there are more rounds than steps.
        """
        if self.rounds > self.steps:
            raise DistillError(
                f"{self.steps} steps are fewer than {self.rounds} rounds: each round needs one"
            )

    def first_step(self, number: int) -> int:
        """Return the step before which a round is recorded."""
        return self.steps * number // self.rounds
