"""Stored tensors cut into runs: bytes that are read together, and where their elements go."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from quant.weights.header import StoredTensor

_ALIGNMENT = 16  # what any dtype's view of a buffer may ask for
_GAP_BYTES = 64 << 10  # what is read in vain rather than asked for in two pieces

ReadRequest = tuple[StoredTensor, Tensor]
"""A tensor in a file, and the contiguous tensor of the same shape that is to hold it."""


@dataclass(frozen=True, slots=True)
class ReadLimits:
    """How a way likes its runs.

    Attributes:
        run_bytes: what a run holds at most.
        gather_bytes: tensors below this are read together wherever in their file they lie.
        join: whether large tensors that lie in memory as they do in their file are one run.
    """

    run_bytes: int
    gather_bytes: int = 0
    join: bool = False


@dataclass(frozen=True, slots=True)
class TensorSlice:
    """Some of a stored tensor's elements, flat, and where they go.

    Attributes:
        at: where they begin in the bytes of their run.
    """

    stored: StoredTensor
    target: Tensor
    first: int
    count: int
    at: int

    @property
    def start(self) -> int:
        """Their first byte in the file."""
        return self.stored.start + self.first * self.stored.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Their bytes in the file."""
        return self.count * self.stored.dtype.itemsize

    @property
    def converts(self) -> bool:
        """Whether they are wanted in another dtype."""
        return self.target.dtype is not self.stored.dtype

    def destination(self) -> Tensor:
        """The part of the target that takes them."""
        if self.count == self.target.numel():
            return self.target.detach()
        return self.target.detach().reshape(-1)[self.first : self.first + self.count]


@dataclass(frozen=True, slots=True)
class FileRange:
    """Bytes of a file: [start, start + nbytes), and where they begin in those of their run."""

    start: int
    nbytes: int
    at: int


@dataclass(slots=True)
class ReadRange:
    """Bytes that are read together, and the tensors in them.

    Attributes:
        spans: where in the file they lie.
        completes: the wanted tensors of which nothing is left to be read after this run.
        address: where in memory they go just as they lie in the file; None where they do not.
        gathered: whether they are small tensors from anywhere in the file.
    """

    file: Path
    spans: list[FileRange] = field(default_factory=list)
    pieces: list[TensorSlice] = field(default_factory=list)
    completes: list[Tensor] = field(default_factory=list)
    address: int | None = None
    gathered: bool = False

    @property
    def nbytes(self) -> int:
        """How many bytes it has, between its spans a few that nobody wants."""
        return self.spans[-1].at + self.spans[-1].nbytes if self.spans else 0

    @property
    def in_place(self) -> Tensor | None:
        """The destination, flat, if it is one that begins here and needs no conversion."""
        piece = self.pieces[0]
        if len(self.pieces) > 1 or piece.at or piece.converts:
            return None
        return piece.destination().reshape(-1)

    def add(self, stored: StoredTensor, target: Tensor, first: int, count: int) -> None:
        """Append elements of a tensor."""
        start = stored.start + first * stored.dtype.itemsize
        end = start + count * stored.dtype.itemsize
        last = self.spans[-1] if self.spans else None
        if last is not None and 0 <= start - (last.start + last.nbytes) < _GAP_BYTES:
            self.spans[-1] = last = FileRange(last.start, end - last.start, last.at)
        else:
            whole = count == target.numel() and self.address is None
            # From a multiple on, so that what is aligned in the file is so here.
            begin = start // _ALIGNMENT * _ALIGNMENT if whole else start
            at = -(-self.nbytes // _ALIGNMENT) * _ALIGNMENT
            last = FileRange(begin, end - begin, at)
            self.spans.append(last)
        self.pieces.append(TensorSlice(stored, target, first, count, last.at + start - last.start))
        if first + count == target.numel():
            self.completes.append(target)


def cut_into_runs(wanted: Iterable[ReadRequest], cut: ReadLimits) -> Iterator[ReadRange]:
    """Put what can be read together into runs, and cut what is too large for one by itself.

    Tensors without elements are in no run.
    """
    run: ReadRange | None = None
    for stored, target in wanted:
        if not target.numel():
            continue
        if run is not None and not _fits(run, stored, target, cut):
            yield run
            run = None
        if run is not None:
            run.add(stored, target, 0, target.numel())
            continue
        # Room for the bytes before the first one's alignment.
        step = max(cut.run_bytes // stored.dtype.itemsize - _ALIGNMENT, 1)
        for first in range(0, target.numel(), step):
            if run is not None:
                yield run
            count = min(step, target.numel() - first)
            run = _new_run(stored, target, first, cut)
            run.add(stored, target, first, count)
    if run is not None:
        yield run


def _new_run(stored: StoredTensor, target: Tensor, first: int, cut: ReadLimits) -> ReadRange:
    address = None
    if _goes_straight(stored, target, cut):
        address = target.data_ptr() + first * target.dtype.itemsize
    return ReadRange(stored.file, address=address, gathered=_is_gathered(stored, cut))


def _is_gathered(stored: StoredTensor, cut: ReadLimits) -> bool:
    return stored.nbytes < cut.gather_bytes


def _goes_straight(stored: StoredTensor, target: Tensor, cut: ReadLimits) -> bool:
    return cut.join and target.dtype is stored.dtype and not _is_gathered(stored, cut)


def _fits(run: ReadRange, stored: StoredTensor, target: Tensor, cut: ReadLimits) -> bool:
    """Whether a tensor may be read together with those of a run."""
    if stored.file != run.file or run.gathered != _is_gathered(stored, cut):
        return False
    gap = stored.start - (run.spans[-1].start + run.spans[-1].nbytes)
    near = 0 <= gap < _GAP_BYTES
    added = stored.nbytes + (gap if near else 2 * _ALIGNMENT)
    if run.nbytes + added > cut.run_bytes:
        return False
    if run.gathered:
        return True
    straight = _goes_straight(stored, target, cut)
    if run.address is not None:
        return straight and gap == 0 and target.data_ptr() == run.address + run.nbytes
    return near and not straight


@torch.no_grad()
def deliver(data: Tensor, run: ReadRange) -> None:
    """Give each piece of a run its elements, in the dtype it is wanted in.

    Args:
        data: [bytes] uint8, the run's.
    """
    # Each of torch's functions lets go of the interpreter's lock and has to get it back, so there
    # are as few here as can be: a view for each piece, and one function that copies all of a kind.
    # Of one kind, because on a card that function has taken all targets for the first one's dtype.
    typed: dict[torch.dtype, Tensor] = {}
    kinds: dict[tuple[torch.dtype, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
    for piece in run.pieces:
        dtype, target = piece.stored.dtype, piece.destination()
        if piece.at % dtype.itemsize:  # a view of another dtype begins at a multiple of its size
            part = data[piece.at : piece.at + piece.nbytes].clone()
            source = part.view(dtype).view(target.shape)
        else:
            if dtype not in typed:
                whole = data.numel() // dtype.itemsize * dtype.itemsize
                typed[dtype] = data[:whole].view(dtype)
            view = typed[dtype]
            offset = view.storage_offset() + piece.at // dtype.itemsize
            source = view.as_strided(target.shape, target.stride(), offset)
        targets, sources = kinds.setdefault((target.dtype, dtype), ([], []))
        targets.append(target)
        sources.append(source)
    for targets, sources in kinds.values():
        torch._foreach_copy_(targets, sources, non_blocking=True)
