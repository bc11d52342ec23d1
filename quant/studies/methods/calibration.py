"""Calibrate all methods at once: one float32 pass over points, block by block.

A linear's inputs are measured once, also for linears that share them. What methods round in
calibration, GPTQ's weights, is made while a block's second moments are there, and kept on disk as
BF16 numbers before their scale, which hold the codes of every format of 8 bits exactly.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from quant.errors import StudyError
from quant.numerics.scaling import binade_histogram
from quant.studies.block_stream import Conditions
from quant.studies.methods.method import InputStatistics, Method
from quant.studies.output.study_folder import StudyFolder
from quant.studies.points import Point
from quant.studies.progress import StudyProgress
from quant.studies.protection.analyze import Subject
from quant.weights.writer import to_bytes, write_whole


@dataclass(frozen=True, slots=True)
class Calibration:
    """What calibration has kept, in a folder of its own inside a study's.

    Attributes:
        steps: the denoising steps that it has seen, ascending.
    """

    path: Path
    steps: tuple[int, ...]

    def statistics(self, index: int, device: torch.device) -> dict[str, InputStatistics]:
        """Return what was measured of the inputs of a block's linears, by their name inside it.

        Raises:
            StudyError: the file is missing or damaged.
        """
        tensors = _read(self.file(index), device)
        names = {name.rpartition(".")[0] for name in tensors}
        return {
            name: InputStatistics(*(tensors[f"{name}.{part}"] for part in _PARTS)) for name in names
        }

    def codes(self, index: int, method: Method, device: torch.device) -> dict[str, Tensor]:
        """Return the weights that calibration has rounded by a method, before their scale.

        They are [N, K] bf16 by the linear's name inside the block; none for methods that round
        when they are used.

        Raises:
            StudyError: the file is missing or damaged.
        """
        if not method.rounding.needs_hessian:
            return {}
        return _read(self.file(index, method), device)

    def file(self, index: int, method: Method | None = None) -> Path:
        """Return the file of a block's statistics, or of its weights as a method rounds them."""
        name = f"{index:03d}" if method is None else f"{index:03d}-{method.name}"
        return self.path / f"{name}.safetensors"


_PARTS = ("channels", "steps", "binades")


def _read(file: Path, device: torch.device) -> dict[str, Tensor]:
    try:
        return load_file(file, device=str(device))
    except (OSError, SafetensorError) as error:
        raise StudyError(
            f"{file} cannot be read: delete {file.parents[1]} and begin anew"
        ) from error


def calibrate(
    subject: Subject,
    points: Sequence[Point],
    methods: Sequence[Method],
    batch: int,
    folder: StudyFolder,
    progress: StudyProgress,
) -> Calibration:
    """Measure inputs at points and round weights, a unit for each block.

    The streams of all points stay on `subject.host` while their blocks run; `batch` points of one
    step run together. A block whose files are gone is measured again: a study may be moved without
    them.

    Raises:
        StudyError: a value is not finite, or the disk cannot take a file.
    """
    calibration = Calibration(
        folder.path / "calibration", tuple(sorted({each.step for each in points}))
    )
    blocks = subject.exact.blocks
    rounding = [method for method in methods if method.rounding.needs_hessian]
    missing = [
        index
        for index in range(blocks)
        if folder.unit(f"calibration/{index}") is None
        or not all(calibration.file(index, each).exists() for each in (None, *rounding))
    ]
    if not missing:
        progress.skip(blocks * len(points))
        return calibration
    groups = _of_one_step(points, batch)
    streams, conditions = _begun(subject, groups)
    for index in range(blocks):
        progress.describe(f"calibration, block {index + 1} of {blocks}")
        start = time.monotonic()
        block = subject.exact.block(index)
        names = subject.linears[index] if index in missing else ()
        meter = _Meter(calibration.steps, with_hessian=bool(rounding))
        with meter.watching(block, names):
            for place, group in enumerate(groups):
                meter.step = group[0].step
                streams[place] = _run(subject, block, streams[place], conditions[place])
                progress.advance(len(group))
        if index in missing:
            measured = time.monotonic() - start
            _write(calibration.file(index), meter.tensors())
            seconds = {}
            for method in rounding:
                start = time.monotonic()
                codes = _codes(block, names, meter, method)
                seconds[method.name] = time.monotonic() - start
                _write(calibration.file(index, method), codes)
            folder.keep(f"calibration/{index}", {"measuring_s": measured, "rounding_s": seconds})
    return calibration


def _begun(
    subject: Subject, groups: Sequence[Sequence[Point]]
) -> tuple[list[Tensor], list[Conditions]]:
    """Begin a pass over each group; each stream is put where streams stay before the next one."""
    streams, conditions = [], []
    for group in groups:
        stream, each = subject.exact.begin(group)
        streams.append(stream.to(subject.host))
        conditions.append(each)
    return streams, conditions


def _of_one_step(points: Sequence[Point], batch: int) -> list[list[Point]]:
    """Divide points into groups of at most `batch` of one denoising step."""
    groups: list[list[Point]] = []
    for step in sorted({each.step for each in points}):
        same = [each for each in points if each.step == step]
        groups += [same[start : start + batch] for start in range(0, len(same), batch)]
    return groups


class _Meter:
    """Measures the inputs of a block's linears."""

    def __init__(self, steps: tuple[int, ...], *, with_hessian: bool) -> None:
        self.step = 0
        self.hessians: dict[str, Tensor] = {}
        self._steps = steps
        self._with_hessian = with_hessian
        self._inputs: dict[str, InputStatistics] = {}
        self._last: tuple[str, Tensor] | None = None
        self._same: dict[str, str] = {}

    @contextmanager
    def watching(self, block: nn.Module, names: Sequence[str]) -> Iterator[None]:
        """Measure while the block runs."""
        handles = [
            block.get_submodule(name).register_forward_pre_hook(partial(self._take, name))
            for name in names
        ]
        try:
            yield
        finally:
            self._last = None
            for handle in handles:
                handle.remove()

    def owner(self, name: str) -> str:
        """Return the linear whose input was measured for `name`: the first that has the same."""
        return self._same.get(name, name)

    def tensors(self) -> dict[str, Tensor]:
        """Return the statistics as `Calibration.statistics` reads them."""
        found = {}
        for name in (*self._inputs, *self._same):
            seen = self._inputs[self.owner(name)]
            for part in _PARTS:
                found[f"{name}.{part}"] = getattr(seen, part).cpu().clone()
        return found

    def _take(self, name: str, _module: nn.Module, inputs: tuple[Any, ...]) -> None:
        x = inputs[0]
        if self._last is not None and self._last[1] is x:
            self._same[name] = self._last[0]
            return
        self._last = (name, x)
        rows = x.detach().float().reshape(-1, x.shape[-1])
        channels = rows.abs().amax(0)
        if not channels.isfinite().all():
            raise StudyError(
                f"the input of {name} has NaN or infinity at step {self.step}: check the model's "
                "weights with `python -m quant calibrate`"
            )
        binades = binade_histogram(rows.reshape(1, -1))[0]
        place = self._steps.index(self.step)
        if name not in self._inputs:
            steps = channels.new_zeros(len(self._steps))
            counts = binades.new_zeros(len(self._steps), len(binades))
            self._inputs[name] = InputStatistics(torch.zeros_like(channels), steps, counts)
        seen = self._inputs[name]
        torch.maximum(seen.channels, channels, out=seen.channels)
        seen.steps[place] = torch.maximum(seen.steps[place], channels.amax())
        seen.binades[place] += binades
        if self._with_hessian:
            if name not in self.hessians:
                self.hessians[name] = rows.new_zeros(rows.shape[1], rows.shape[1])
            self.hessians[name] += rows.T @ rows


@torch.no_grad()
def _run(subject: Subject, block: nn.Module, stream: Tensor, conditions: Conditions) -> Tensor:
    """Take a stream from where it stays through a block and back."""
    before = stream.to(subject.exact.device)
    after: Tensor = block(before, conditions.text, conditions.timestep, conditions.rope)
    return after.to(subject.host)


def _codes(
    block: nn.Module, names: Sequence[str], meter: _Meter, method: Method
) -> dict[str, Tensor]:
    """Round a block's weights by a method, and divide them by their scale."""
    codes = {}
    for name in names:
        weight = block.get_submodule(name).weight.detach().float()  # type: ignore[operator]
        rounded = method.rounding.round(weight, method.weight, meter.hessians[meter.owner(name)])
        codes[name] = (rounded / method.weight.scale_of(weight)).bfloat16().cpu()
    return codes


def _write(file: Path, tensors: dict[str, Tensor]) -> None:
    try:
        file.parent.mkdir(exist_ok=True)
        write_whole(file, to_bytes(tensors, {}))
    except OSError as error:
        raise StudyError(
            f"cannot write {file}: {error.strerror or error}; make room for it, "
            "and the same command goes on from here"
        ) from error
