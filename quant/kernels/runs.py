"""Stored tensors cut into runs: bytes that are read at once, and where their elements go."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from quant.safetensors_header import StoredTensor

_ALIGNMENT = 16  # what any dtype's view of a buffer may ask for
_GAP_BYTES = 64 << 10  # what is read in vain rather than asked for in two pieces

Wanted = tuple[StoredTensor, Tensor]
"""A tensor in a file, and the contiguous tensor of the same shape that is to hold it."""


@dataclass(slots=True)
class Run:
    """Bytes that are read at once, and the tensors in them.

    Attributes:
        pieces: of each tensor, where in the file it begins, and what is to hold it: all of it, or
            the part of its elements, flat, that begins there.
        completes: the wanted tensors of which nothing is left to be read after this run.
    """

    file: Path
    start: int
    pieces: list[tuple[StoredTensor, int, Tensor]] = field(default_factory=list)
    completes: list[Tensor] = field(default_factory=list)
    end: int = 0

    def add(self, stored: StoredTensor, target: Tensor) -> None:
        """Append a whole tensor."""
        self.add_piece(stored, stored.start, target)
        self.completes.append(target)

    def add_piece(self, stored: StoredTensor, first_byte: int, target: Tensor) -> None:
        """Append a piece of `stored` that begins at `first_byte`."""
        self.pieces.append((stored, first_byte, target))
        self.end = first_byte + size_in_file(stored, target)

    @property
    def in_place(self) -> Tensor | None:
        """The destination, flat, if it is one that begins here and needs no conversion."""
        stored, first_byte, target = self.pieces[0]
        if len(self.pieces) > 1 or first_byte != self.start or target.dtype is not stored.dtype:
            return None
        return target.detach().reshape(-1)


def cut_into_runs(wanted: Iterable[Wanted], limit: int) -> Iterator[Run]:
    """Put neighbours into runs of up to `limit` bytes, and cut what is larger by itself.

    Tensors without elements are in no run.
    """
    run: Run | None = None
    for stored, target in wanted:
        if not target.numel():
            continue
        if run is not None and not _fits(run, stored, limit):
            yield run
            run = None
        step = limit // _ALIGNMENT * _ALIGNMENT // stored.dtype.itemsize
        step -= _ALIGNMENT  # room for the bytes before the first one's alignment
        if run is not None:
            run.add(stored, target)
        elif target.numel() <= step:
            run = Run(stored.file, stored.start // _ALIGNMENT * _ALIGNMENT)
            run.add(stored, target)
        else:
            flat = target.detach().reshape(-1)
            for first in range(0, flat.numel(), step):
                start = stored.start + first * stored.dtype.itemsize
                part = Run(stored.file, start)
                part.add_piece(stored, start, flat[first : first + step])
                if first + step >= flat.numel():
                    part.completes.append(target)
                yield part
    if run is not None:
        yield run


def _fits(run: Run, stored: StoredTensor, limit: int) -> bool:
    """Whether a tensor may be read together with those of a run."""
    near = stored.file == run.file and run.end <= stored.start < run.end + _GAP_BYTES
    return near and stored.start + stored.nbytes - run.start <= limit


@torch.no_grad()
def deliver(data: Tensor, run: Run) -> None:
    """Give each piece of a run its elements, in the dtype it is wanted in.

    Args:
        data: [bytes] uint8, the run's.
    """
    # Each of torch's functions lets go of the interpreter's lock and has to get it back, so there
    # are as few here as can be: a view for each piece, and one function that copies all of a kind.
    # Of one kind, because on a card that function has taken all targets for the first one's dtype.
    typed: dict[torch.dtype, Tensor] = {}
    kinds: dict[tuple[torch.dtype, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
    for stored, first_byte, target in run.pieces:
        start, size = first_byte - run.start, stored.dtype.itemsize
        if start % size:  # a view of another dtype has to begin at a multiple of its size
            part = data[start : start + size_in_file(stored, target)].clone()
            source = part.view(stored.dtype).view(target.shape)
        else:
            if stored.dtype not in typed:
                typed[stored.dtype] = data[: data.numel() // size * size].view(stored.dtype)
            whole = typed[stored.dtype]
            offset = whole.storage_offset() + start // size
            source = whole.as_strided(target.shape, target.stride(), offset)
        targets, sources = kinds.setdefault((target.dtype, stored.dtype), ([], []))
        targets.append(target)
        sources.append(source)
    for targets, sources in kinds.values():
        torch._foreach_copy_(targets, sources, non_blocking=True)


def size_in_file(stored: StoredTensor, target: Tensor) -> int:
    """The bytes in a file that fill `target`."""
    return target.numel() * stored.dtype.itemsize
