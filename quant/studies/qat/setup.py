"""Prepare a study of QAT: check its inputs, and build the student, the trainer and the ruler."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from quant.device import backend
from quant.errors import StudyError
from quant.studies.methods.calibration import Calibration
from quant.studies.methods.registry import METHODS
from quant.studies.points import Point, PointsFolder
from quant.studies.progress import StudyProgress
from quant.studies.protection.ablate import HeldOut
from quant.studies.protection.analyze import Subject
from quant.studies.protection.block_sets import paper_sets
from quant.studies.qat.clips import ClipsFolder
from quant.studies.qat.grid import CONTROL, Grid
from quant.studies.qat.measure import Ruler
from quant.studies.qat.samples import FlowLesson, Lesson, Samples, TeacherLesson, samples_of
from quant.studies.qat.student import Student, trained_weights
from quant.studies.qat.training import Trainer

_LEVELS = 4
"""At how many noise levels each held-out clip is measured."""
_BYTES_EACH = 16
"""Of a trained weight: itself, its gradient and Adam's two moments, in float32."""
_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Material:
    """What is trained and measured on.

    Attributes:
        training, held_out: recorded points; static scales are those of the training points.
        clips, held_out_clips: for flow matching; both or none.
        flow_shift: of noise levels in flow matching.
    """

    training: HeldOut
    held_out: HeldOut
    clips: ClipsFolder | None = None
    held_out_clips: ClipsFolder | None = None
    flow_shift: float = 1.0

    def check(self, fingerprint: str, grid: Grid) -> None:
        """Refuse material of another model, or that overlaps, or that a run needs more of.

        Raises:
            StudyError: says what is wrong, and the remedy.
        """
        held_out = frozenset(self.held_out.points.info.prompts)
        for points in (self.training.points, self.held_out.points):
            points.check_model(fingerprint)
        self.held_out.points.check_apart(
            frozenset(self.training.points.info.prompts),
            f"the training set {self.training.points.path}",
        )
        self._check_shapes()
        if self.clips is None or self.held_out_clips is None:
            points = self.training.points
            each = self.training.count // len(points.info.prompts)
            grid.check_data(len(points.info.prompts), each, "prompts")
            return
        for clips in (self.clips, self.held_out_clips):
            clips.check_model(fingerprint)
        held_out |= frozenset(self.held_out_clips.info.captions)
        self.clips.check_apart(held_out, "what is held out")
        if self.clips.info.shape != self.held_out_clips.info.shape:
            raise StudyError(
                f"{self.clips.path} has latents of {self.clips.info.shape}, "
                f"{self.held_out_clips.path} of {self.held_out_clips.info.shape}: encode both from "
                "videos of one size and length"
            )
        grid.check_data(len(self.clips), 1, "clips")

    @property
    def measured(self) -> int:
        """How many samples one measurement runs."""
        clips = 0 if self.held_out_clips is None else len(self.held_out_clips)
        return self.held_out.count + _LEVELS * clips

    def identity(self) -> dict[str, str]:
        """Return what results depend on, as `StudyFolder` takes it."""
        found = {
            "set of points": _described(self.held_out.points, self.held_out.per_prompt),
            "set of training points": _described(self.training.points, self.training.per_prompt),
        }
        if self.clips is not None and self.held_out_clips is not None:
            for name, clips in (("clips", self.clips), ("held-out clips", self.held_out_clips)):
                found[f"set of {name}"] = json.dumps(asdict(clips.info), sort_keys=True)
        return found

    def _check_shapes(self) -> None:
        """Points that run in one batch need one size."""
        first, second = (
            (info.sampler.size, info.sampler.num_frames, info.sampler.text_tokens)
            for info in (self.training.points.info, self.held_out.points.info)
        )
        if first != second:
            raise StudyError(
                f"{self.training.points.path} has size, frames and text tokens {first}, "
                f"{self.held_out.points.path} {second}: record both alike"
            )


@dataclass(frozen=True, slots=True)
class Options:
    """How training computes.

    Attributes:
        protected: blocks whose linears are not rounded.
        rank: of LoRA adapters; None trains all weights.
        dtype: of products in training.
        checkpointing: compute a block's activations again in the backward pass, to save memory.
        capture: replay steps as CUDA graphs.
    """

    protected: tuple[int, ...]
    rank: int | None
    dtype: torch.dtype
    checkpointing: bool
    capture: bool

    def identity(self) -> dict[str, str]:
        """Return what results depend on, as `StudyFolder` takes it."""
        return {
            "protected set": ",".join(map(str, self.protected)),
            "adapter": "none" if self.rank is None else f"LoRA of rank {self.rank}",
            "dtype": str(self.dtype).removeprefix("torch."),
        }


def protected_blocks(text: str, blocks: int) -> tuple[int, ...]:
    """Read which blocks are protected: "none", "paper", or numbers with commas.

    Raises:
        StudyError: a number is not one of a block.
    """
    if text in ("none", "paper"):
        return paper_sets(blocks)["both ends" if text == "paper" else "none"]
    parts = [each.strip() for each in text.split(",")]
    if not all(each.isdecimal() and int(each) < blocks for each in parts):
        raise StudyError(
            f"protected blocks {text!r} must be none, paper, or numbers from 0 to {blocks - 1} "
            "with commas between"
        )
    return tuple(sorted({int(each) for each in parts}))


def check_memory(subject: Subject, options: Options) -> int:
    """Return the bytes that weights, gradients and moments take, at least.

    Raises:
        StudyError: a GPU has less memory free.
    """
    trained = trained_weights(subject, options.protected, options.rank)
    needed = _BYTES_EACH * trained
    if options.rank is not None:
        needed += sum(4 * each.numel() for each in subject.exact.transformer.parameters())
    if subject.exact.device.type != "cpu":
        free, _ = backend("cuda").mem_get_info()
        if needed > free:
            raise StudyError(
                f"training {trained:,} weights takes at least {needed / _GIB:.1f} GiB, and the "
                f"device has {free / _GIB:.1f} GiB free: train adapters with --adapter lora, or "
                "use a larger device"
            )
    return needed


def training_points(material: Material) -> list[Point]:
    """Return the points that scales, and the teacher's lesson, are made of."""
    prompts = range(len(material.training.points.info.prompts))
    return [point for prompt in prompts for point in material.training.of_prompt(prompt)]


def build(
    subject: Subject,
    material: Material,
    calibration: Calibration,
    grid: Grid,
    options: Options,
    progress: StudyProgress,
) -> tuple[Student, Trainer, Ruler, dict[str, list[str]]]:
    """Build everything that a session needs; also return the owners of the values, by measure."""
    lesson: Lesson
    samples: dict[str, Samples] = {}
    owners: dict[str, list[str]] = {}
    held_out = [
        point
        for prompt in range(len(material.held_out.points.info.prompts))
        for point in material.held_out.of_prompt(prompt)
    ]
    samples["velocity"] = _with_velocity(subject, held_out, progress)
    owners["velocity"] = [point.prompt for point in held_out]
    if material.clips is None or material.held_out_clips is None:
        points = training_points(material)
        each = len(points) // len(material.training.points.info.prompts)
        lesson = TeacherLesson(_with_velocity(subject, points, progress), each)
    else:
        shift = material.flow_shift
        lesson = FlowLesson(material.clips.clips(), material.clips.negative(), shift)
        exam = FlowLesson(
            material.held_out_clips.clips(), material.held_out_clips.negative(), shift
        )
        parts = [exam.examination(number, _LEVELS) for number in range(len(exam.clips))]
        samples["flow"] = Samples(
            *(torch.cat(each) for each in zip(*(part.tensors for part in parts), strict=True))
        )
        owners["flow"] = [
            text for text in material.held_out_clips.info.captions for _ in range(_LEVELS)
        ]
    student = Student.of(
        subject,
        options.protected,
        rank=options.rank,
        autocast=None if options.dtype is torch.float32 else options.dtype,
        seed=0,
    )
    if options.checkpointing:
        student.model.enable_gradient_checkpointing()
    methods = {
        name: (METHODS[name], student.input_scales(METHODS[name], calibration))
        for name in (CONTROL, *grid.methods)
    }
    trainer = Trainer(student, lesson, options.capture and not options.checkpointing)
    return student, trainer, Ruler(student, samples, methods, options.capture), owners


def _with_velocity(
    subject: Subject, points: Sequence[Point], progress: StudyProgress, at_once: int = 8
) -> Samples:
    """Join points with the velocity that the original has there in float32."""
    progress.describe("float32")
    found = []
    for start in range(0, len(points), at_once):
        part = points[start : start + at_once]
        found.append(subject.exact.velocity(part).cpu())
        progress.advance(subject.exact.blocks * len(part))
    return samples_of(points, torch.cat(found))


def _described(points: PointsFolder, per_prompt: int) -> str:
    return json.dumps({**asdict(points.info), "used of each": per_prompt}, sort_keys=True)


def flow_shift(points: PointsFolder, model: Path) -> float:
    """Return the shift of noise levels: that of the points' sampling, or the model's own.

    Raises:
        StudyError: the model's scheduler cannot be read.
    """
    if points.info.sampler.flow_shift is not None:
        return points.info.sampler.flow_shift
    file = model / "scheduler" / "scheduler_config.json"
    try:
        config: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StudyError(f"{file} cannot be read: {error}") from error
    return next((float(config[key]) for key in ("flow_shift", "shift") if config.get(key)), 1.0)
