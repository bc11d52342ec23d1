"""Keep points of real trajectories: what the transformer is given at some steps of some prompts.

Everything that is teacher-forced runs on them. At a point a model's velocity is compared with that
of a reference on the same input, so that no error of an earlier step is in it. A folder of points
has one safetensors file for each prompt, and `points.json`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from quant.calibration.sampler import SamplerSettings
from quant.errors import CalibrationError, StudyError
from quant.weights.writer import to_bytes, write_whole

FORMAT_VERSION = 1
_INDEX = "points.json"


@dataclass(frozen=True, slots=True)
class Point:
    """What the transformer is given once.

    Attributes:
        prompt, seed: of the trajectory; `prompt` is the text.
        step: number of the denoising step; 0 is the noisiest.
        branch: "prompt" or "negative", of guidance.
        latents: [1, C, F, H, W] float32.
        timestep: [1] float32.
        text: the embedded prompt, [1, T, D] in the model's dtype.
    """

    prompt: str
    seed: int
    step: int
    branch: str
    latents: Tensor
    timestep: Tensor
    text: Tensor

    @property
    def name(self) -> str:
        """A name that no other point of the same folder has."""
        return f"{self.seed}/{self.step}/{self.branch}"


@dataclass(frozen=True, slots=True)
class PointsInfo:
    """What points were recorded from.

    Attributes:
        model: fingerprint of the model's folder.
        prompts: the texts, in order; the i-th file holds the points of the i-th.
        prompts_sha256: of the set of prompts (`PromptSet.sha256`).
        steps: numbers of the denoising steps that are kept, ascending.
        batch: how many prompts ran together.
        device: on which; "" in a folder of before, which does not say it. Both change last bits.
    """

    model: str
    prompts: tuple[str, ...]
    prompts_sha256: str
    prompts_file: str
    sampler: SamplerSettings
    steps: tuple[int, ...]
    batch: int = 1
    device: str = ""

    @property
    def points(self) -> int:
        """How many points there are."""
        branches = 2 if self.sampler.guidance_scale > 1 else 1
        return len(self.prompts) * len(self.steps) * branches

    def differences(self, other: PointsInfo) -> list[str]:
        """Return the names of what differs; a device that is not known may be any."""
        names = [each.name for each in fields(self)]
        known = self.device and other.device
        return [
            name
            for name in names
            if getattr(self, name) != getattr(other, name) and (known or name != "device")
        ]


class PointsFolder:
    """A folder of points. Create it with `open_points` or `new_points`."""

    def __init__(self, path: Path, info: PointsInfo) -> None:
        self.path = path
        self.info = info

    def has(self, prompt: int) -> bool:
        """Return whether the points of a prompt have been written."""
        return self._file(prompt).exists()

    def write(self, prompt: int, tensors: Mapping[str, Tensor]) -> None:
        """Write the points of a prompt, whole or not at all.

        Args:
            tensors: "latents" [steps, C, F, H, W] float32, "timesteps" [steps] float32, "prompt"
                [T, D] and, with guidance, "negative" [T, D].

        Raises:
            StudyError: a value is not finite, or the disk cannot take the file.
        """
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise StudyError(
                    f"{name} of prompt {self.info.prompts[prompt]!r} has NaN or infinity: check "
                    "the model's weights with `python -m quant calibrate`, which names the layer"
                )
        try:
            write_whole(self._file(prompt), to_bytes(tensors, {}))
        except OSError as error:
            raise StudyError(
                f"cannot write {self._file(prompt)}: {error.strerror or error}; make room for it, "
                "and the same command goes on from here"
            ) from error

    def of_prompt(self, prompt: int) -> Iterator[Point]:
        """Yield the points of one prompt.

        Raises:
            StudyError: their file is missing or damaged.
        """
        try:
            tensors = load_file(self._file(prompt))
            latents, timesteps = tensors["latents"], tensors["timesteps"]
            texts = {name: tensors[name] for name in ("prompt", "negative") if name in tensors}
        except (OSError, SafetensorError, KeyError) as error:
            raise StudyError(
                f"{self._file(prompt)} cannot be read: run `python -m quant record` again"
            ) from error
        for index, step in enumerate(self.info.steps):
            for branch, text in texts.items():
                yield Point(
                    self.info.prompts[prompt],
                    self.info.sampler.seed + prompt,
                    step,
                    branch,
                    latents[index : index + 1].float(),
                    timesteps[index : index + 1],
                    text.unsqueeze(0),
                )

    def __iter__(self) -> Iterator[Point]:
        """Yield all points, prompt by prompt."""
        for prompt in range(len(self.info.prompts)):
            yield from self.of_prompt(prompt)

    def check_model(self, fingerprint: str) -> None:
        """Refuse points of another model.

        Raises:
            StudyError: the points were recorded from another one.
        """
        if self.info.model != fingerprint:
            raise StudyError(
                f"{self.path} was recorded from another model ({self.info.model[:19]}…, not "
                f"{fingerprint[:19]}…): record points of this one"
            )

    def check_apart(self, prompts: frozenset[str], what: str) -> None:
        """Refuse prompts that the points share with another set, such as that of calibration.

        Raises:
            StudyError: names the first shared prompt.
        """
        shared = [prompt for prompt in self.info.prompts if prompt in prompts]
        if shared:
            raise StudyError(
                f"{len(shared)} prompts of {self.path} are also in {what}, the first being "
                f"{shared[0]!r}: choose and test on different prompts"
            )

    def _file(self, prompt: int) -> Path:
        return self.path / f"{prompt:05d}.safetensors"


def new_points(path: Path, info: PointsInfo) -> PointsFolder:
    """Make a folder for points, or go on with one of the same points.

    Raises:
        StudyError: the folder holds something else, or cannot be made.
    """
    if path.exists():
        found = open_points(path, complete=False)
        others = found.info.differences(info)
        if others:
            raise StudyError(
                f"{path} holds other points, of another {' and '.join(others)}: name another "
                "folder, or delete it"
            )
        return found
    try:
        path.mkdir()
        data = {
            "format_version": FORMAT_VERSION,
            **asdict(info),
            "sampler": info.sampler.to_dict(),
        }
        text = json.dumps(data, indent=1, ensure_ascii=False)
        write_whole(path / _INDEX, f"{text}\n".encode())
    except OSError as error:
        raise StudyError(f"cannot make {path}: {error.strerror or error}") from error
    return PointsFolder(path, info)


def open_points(path: Path, *, complete: bool = True) -> PointsFolder:
    """Open a folder of points.

    Args:
        complete: refuse a folder in which prompts are still missing.

    Raises:
        StudyError: the folder is not one of points, of a newer version, or not complete.
    """
    try:
        data: dict[str, Any] = json.loads((path / _INDEX).read_text(encoding="utf-8"))
        version = data.pop("format_version")
        info = PointsInfo(
            sampler=SamplerSettings.from_dict(data.pop("sampler")),
            **_with_tuples(data),
        )
    except (OSError, ValueError, KeyError, TypeError, CalibrationError) as error:
        raise StudyError(
            f"{path} is not a folder of points: make one with `python -m quant record`"
        ) from error
    if version != FORMAT_VERSION:
        raise StudyError(
            f"{path} has version {version!r} of the format; this tool reads {FORMAT_VERSION}"
        )
    folder = PointsFolder(path, info)
    missing = [prompt for prompt in range(len(info.prompts)) if not folder.has(prompt)]
    if complete and missing:
        raise StudyError(
            f"{path} lacks the points of {len(missing)} of {len(info.prompts)} prompts: run the "
            "same `python -m quant record` again, which goes on"
        )
    return folder


def _with_tuples(data: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(each) if isinstance(each, list) else each for name, each in data.items()}
