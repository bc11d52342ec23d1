"""Stored tensors cut into runs: bytes that are read at once, and where their elements go."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from torch import Tensor

from quant.safetensors_header import StoredTensor

_ALIGNMENT = 16  # what any dtype's view of a buffer may ask for
_GAP_BYTES = 64 << 10  # what is read in vain rather than asked for in two pieces

Wanted = tuple[StoredTensor, Tensor]
"""A tensor in a file, and the contiguous tensor of the same shape that is to hold it."""


@dataclass(slots=True)
class Run:
    """Bytes that are read at once, and the elements in them: first of each, and where it goes."""

    file: Path
    start: int
    pieces: list[tuple[StoredTensor, int, Tensor]] = field(default_factory=list)
    end: int = 0

    def add(self, stored: StoredTensor, first_byte: int, target: Tensor) -> None:
        """Append flat elements of `stored`, of which the first lies at `first_byte`."""
        self.pieces.append((stored, first_byte, target))
        self.end = first_byte + size_in_file(stored, target)

    @property
    def in_place(self) -> Tensor | None:
        """The destination, if these are elements of one tensor and need no conversion."""
        stored, _, target = self.pieces[0]
        alone = len(self.pieces) == 1 and self.pieces[0][1] == self.start
        return target if alone and target.dtype is stored.dtype else None


def cut_into_runs(wanted: Iterable[Wanted], limit: int) -> Iterator[Run]:
    """Cut large tensors into runs of up to `limit` bytes; put small neighbours into one."""
    run: Run | None = None
    for stored, target in wanted:
        flat = target.detach().reshape(-1)
        if run is not None and not _fits(run, stored, limit):
            yield run
            run = None
        if run is not None:
            run.add(stored, stored.start, flat)
            continue
        step = limit // _ALIGNMENT * _ALIGNMENT // stored.dtype.itemsize
        step -= _ALIGNMENT  # room for the bytes before the first one's alignment
        for first in range(0, max(1, flat.numel()), step):
            part = flat[first : first + step]
            start = stored.start + first * stored.dtype.itemsize
            if len(part) < flat.numel():
                whole = Run(stored.file, start)
                whole.add(stored, start, part)
                yield whole
            elif part.numel():
                run = Run(stored.file, start // _ALIGNMENT * _ALIGNMENT)
                run.add(stored, start, part)
    yield from chain([run] if run is not None else [])


def _fits(run: Run, stored: StoredTensor, limit: int) -> bool:
    """Whether a tensor may be read together with those of a run."""
    near = stored.file == run.file and run.end <= stored.start < run.end + _GAP_BYTES
    return near and stored.start + stored.nbytes - run.start <= limit


def deliver(data: Tensor, run: Run) -> None:
    """Give each piece of a run its elements, in the dtype it is wanted in."""
    target = run.in_place
    if target is not None:
        target.view(data.dtype).copy_(data, non_blocking=True)
        return
    for stored, first_byte, target in run.pieces:
        start = first_byte - run.start
        part = data[start : start + size_in_file(stored, target)]
        if start % stored.dtype.itemsize:
            part = part.clone()  # a view of another dtype has to begin at a multiple of its size
        target.copy_(part.view(stored.dtype), non_blocking=True)


def size_in_file(stored: StoredTensor, target: Tensor) -> int:
    """The bytes in a file that fill `target`."""
    return target.numel() * stored.dtype.itemsize
