"""Copies tensors from files to where they are wanted, as fast as the way there allows.

A device reads host memory at full speed only where it is pinned, and pages of a file are not. So a
few threads read a piece of a file into a pinned buffer, which is sent off while they read the next.
To the CPU they read in place. Tensors much smaller than a buffer travel together and are parted at
their destination; what is stored in another dtype than wanted is converted there. No whole tensor
is ever held on the host on its way to a device.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from quant.errors import WeightsError
from quant.safetensors_header import StoredTensor

BUFFER_BYTES = 16 << 20
BUFFERS = 6
SLICE_BYTES = 4 << 20
"""What a thread reads at once: little enough to stay in its core's cache on the way."""
MAX_THREADS = 12
_ALIGNMENT = 16  # what any dtype's view of a buffer may ask for
_GAP_BYTES = 64 << 10  # what is read in vain rather than asked for in two pieces

Wanted = tuple[StoredTensor, Tensor]
"""A tensor in a file, and the contiguous tensor of the same shape that is to hold it."""


class Reader(Protocol):
    """Fills tensors of one device from files: at once (`Copier`) or soon (`CopierBeside`).

    What `read` can raise (`WeightsError`: a file cannot be read, or has become shorter) comes from
    it in the first case, and from `CopierBeside.wait` in the second: until then there is no data.
    """

    @property
    def device(self) -> torch.device: ...

    def read(self, wanted: Iterable[Wanted]) -> None: ...


@dataclass(slots=True)
class _Run:
    """Bytes that are read at once, and the elements in them: first of each, and where it goes."""

    file: Path
    start: int
    pieces: list[tuple[StoredTensor, int, Tensor]] = field(default_factory=list)
    end: int = 0

    def add(self, stored: StoredTensor, first_byte: int, target: Tensor) -> None:
        """Append flat elements of `stored`, of which the first lies at `first_byte`."""
        self.pieces.append((stored, first_byte, target))
        self.end = first_byte + _size(stored, target)

    @property
    def in_place(self) -> Tensor | None:
        """The destination, if these are elements of one tensor and need no conversion."""
        stored, _, target = self.pieces[0]
        alone = len(self.pieces) == 1 and self.pieces[0][1] == self.start
        return target if alone and target.dtype is stored.dtype else None


class Copier:
    """Reads stored tensors into tensors of one device."""

    def __init__(
        self,
        device: torch.device,
        *,
        buffer_bytes: int = BUFFER_BYTES,
        staged: bool | None = None,
    ) -> None:
        """Prepare to copy; buffers are made when something is copied.

        Args:
            staged: whether data passes through buffers; by default wherever the device is not the
                host itself.
        """
        if device.type != "cpu" and device.index is None:
            # Which card is the current one is known to each thread for itself.
            index = torch.get_device_module(device).current_device()
            device = torch.device(device.type, index)
        self.device = device
        self.buffer_bytes = buffer_bytes
        self.staged = device.type != "cpu" if staged is None else staged

    def read(self, wanted: Iterable[Wanted]) -> None:
        """Fill every wanted tensor; when it returns, all have arrived.

        `wanted` is taken little by little, so that tensors may be allocated meanwhile. In the order
        of the files it goes fastest.

        Raises:
            WeightsError: a file cannot be read or has become shorter; it names the tensor.
        """
        threads = min(MAX_THREADS, torch.get_num_threads())
        with ExitStack() as opened, ThreadPoolExecutor(threads, "reader") as pool:
            if self.device.type != "cpu":  # memory is pinned for the current one
                backend = torch.get_device_module(self.device)
                opened.enter_context(backend.device(self.device))
            lane = _Lane(self.device, self.buffer_bytes) if self.staged else None
            files = _Files(opened, pool)
            reading: deque[_Piece] = deque()
            try:
                for run in _runs(wanted, self.buffer_bytes):
                    piece = _Piece(run) if lane is None else lane.piece(run)
                    files.begin(piece)
                    reading.append(piece)
                    if len(reading) == BUFFERS - 1:  # one is on its way
                        _hand_on(reading.popleft(), lane)
                while reading:
                    _hand_on(reading.popleft(), lane)
            finally:
                if lane is not None:
                    lane.finish()


class CopierBeside:
    """A copier in a thread of its own: `read` returns at once, and `wait` when all has arrived.

    A context: left in order it waits, too; left by an error, for no more than what is under way.
    """

    def __init__(self, copier: Copier) -> None:
        self._copier = copier
        self._pool = ThreadPoolExecutor(1, "weights")
        self._begun: list[Future[None]] = []
        self._failed = False

    @property
    def device(self) -> torch.device:
        return self._copier.device

    def read(self, wanted: Iterable[Wanted]) -> None:
        """Take what is wanted, all of it now, and fill it after what was wanted before."""
        self.run(partial(self._copier.read, list(wanted)))

    def run(self, task: Callable[[], None]) -> None:
        """Have the thread do something else when it is its turn."""
        self._begun.append(self._pool.submit(self._unless_failed, task))

    def wait(self) -> None:
        """Wait for all that is to be done; after the first error nothing more is.

        Raises:
            WeightsError: as `Copier.read`.
        """
        while self._begun:
            self._begun.pop(0).result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._pool.shutdown(cancel_futures=error is not None)
        if error is None:
            self.wait()

    def _unless_failed(self, task: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            task()
        except BaseException:
            self._failed = True
            raise


class _Piece:
    """A run on its way, and the host's memory that it is read into."""

    def __init__(self, run: _Run, buffer: Tensor | None = None, sent: Any = None) -> None:
        """sent: the event of the buffer's arrival on a device."""
        self.run, self.sent = run, sent
        self.reads: list[Future[None]] = []
        size = run.end - run.start
        if buffer is not None:
            self.data = buffer[:size]
        elif run.in_place is not None:
            self.data = run.in_place.view(torch.uint8)
        else:
            self.data = torch.empty(size, dtype=torch.uint8)


def _hand_on(piece: _Piece, lane: _Lane | None) -> None:
    """Wait until a piece is read, and send it on."""
    for each in piece.reads:
        each.result()
    if lane is not None:
        lane.send(piece)
    elif piece.run.in_place is None:
        _deliver(piece.data, piece.run)


class _Files:
    """Open files, read by a pool's threads."""

    def __init__(self, opened: ExitStack, pool: ThreadPoolExecutor) -> None:
        self._opened, self._pool = opened, pool
        self._numbers: dict[Path, int] = {}

    def begin(self, piece: _Piece) -> None:
        """Have a piece read."""
        run, view = piece.run, piece.data.numpy().data
        if run.file not in self._numbers:
            try:
                self._numbers[run.file] = os.open(run.file, os.O_RDONLY)
            except OSError as error:
                raise _unreadable(run.file, error) from error
            self._opened.callback(os.close, self._numbers[run.file])
        number = self._numbers[run.file]
        for start in range(0, len(view), SLICE_BYTES):
            part = view[start : start + SLICE_BYTES]
            piece.reads.append(self._pool.submit(_read_slice, number, run, part, start))


def _read_slice(number: int, run: _Run, view: memoryview, first: int) -> None:
    done = 0
    while done < len(view):
        try:
            count = os.preadv(number, [view[done:]], run.start + first + done)
        except OSError as error:
            raise _unreadable(run.file, error) from error
        if count == 0:
            end = run.start + first + done
            cut = next(each for each, at, to in run.pieces if at + _size(each, to) > end)
            raise WeightsError(
                f"{run.file} ends after {end:,} bytes, within tensor {cut.name!r}: the file was "
                "cut; copy or convert it again"
            )
        done += count


def _unreadable(file: Path, error: OSError) -> WeightsError:
    return WeightsError(f"{file} cannot be read: {error.strerror or error}")


class _Lane:
    """The way to a device: pinned buffers, a stream, and a buffer on the device."""

    def __init__(self, device: torch.device, buffer_bytes: int) -> None:
        self._buffer_bytes = buffer_bytes
        self._backend: Any = None if device.type == "cpu" else torch.get_device_module(device)
        self._buffers: list[tuple[Tensor, Any]] = []
        if self._backend is None:
            return
        self._landing = torch.empty(buffer_bytes, dtype=torch.uint8, device=device)
        self._stream = self._backend.Stream(device)
        # Memory that tensors were given may have been freed under work that still runs.
        self._stream.wait_stream(self._backend.current_stream(device))

    def piece(self, run: _Run) -> _Piece:
        """A run with a new buffer, or with the one that was sent off first, once it has arrived."""
        pin = self._backend is not None
        if len(self._buffers) < BUFFERS:
            made = torch.empty(self._buffer_bytes, dtype=torch.uint8, pin_memory=pin)
            self._buffers.append((made, self._backend.Event() if pin else None))
        else:
            self._buffers.append(self._buffers.pop(0))
            if pin:
                self._buffers[-1][1].synchronize()
        return _Piece(run, *self._buffers[-1])

    def send(self, piece: _Piece) -> None:
        """Send a piece, which has been read, to its tensors."""
        data = piece.data
        if self._backend is None:
            _deliver(data, piece.run)
            return
        with self._backend.stream(self._stream):
            if piece.run.in_place is None:
                data = self._landing[: data.numel()].copy_(data, non_blocking=True)
            _deliver(data, piece.run)
            piece.sent.record(self._stream)

    def finish(self) -> None:
        """Wait until all has arrived."""
        if self._backend is not None:
            self._stream.synchronize()


def _runs(wanted: Iterable[Wanted], limit: int) -> Iterator[_Run]:
    """Cut large tensors into runs of up to `limit` bytes; put small neighbours into one."""
    run: _Run | None = None
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
                whole = _Run(stored.file, start)
                whole.add(stored, start, part)
                yield whole
            elif part.numel():
                run = _Run(stored.file, start // _ALIGNMENT * _ALIGNMENT)
                run.add(stored, start, part)
    yield from chain([run] if run is not None else [])


def _fits(run: _Run, stored: StoredTensor, limit: int) -> bool:
    """Whether a tensor may be read together with those of a run."""
    near = stored.file == run.file and run.end <= stored.start < run.end + _GAP_BYTES
    return near and stored.start + stored.nbytes - run.start <= limit


def _deliver(data: Tensor, run: _Run) -> None:
    """Give each piece of a run its elements, in the dtype it is wanted in."""
    target = run.in_place
    if target is not None:
        target.view(torch.uint8).copy_(data, non_blocking=True)
        return
    for stored, first_byte, target in run.pieces:
        start = first_byte - run.start
        part = data[start : start + _size(stored, target)]
        if start % stored.dtype.itemsize:
            part = part.clone()  # a view of another dtype has to begin at a multiple of its size
        target.copy_(part.view(stored.dtype), non_blocking=True)


def _size(stored: StoredTensor, target: Tensor) -> int:
    """The bytes in a file that fill `target`."""
    return target.numel() * stored.dtype.itemsize
