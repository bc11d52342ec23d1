"""The ways that bytes of files take into tensors; `TensorReader` takes the best that a device has.

- Into the host's memory, threads read in place, or beside it where something has to be converted.
- A device reads host memory at full speed only where it is pinned, and pages of a file are not. So
  threads read a piece of a file into a pinned buffer, which is sent off while they read the next.
- To an NVIDIA card with fastsafetensors installed, its threads do the same without Python's lock,
  for large pieces of files: many tensors at once, where they lie in memory as in the file.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from itertools import cycle
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from quant.errors import WeightsError
from quant.weights.fastsafetensors_reader import FileReader
from quant.weights.header import SMALL_BYTES
from quant.weights.read_plan import ReadLimits, ReadRange, deliver

BUFFER_BYTES = 16 << 20
BUFFERS = 6
SLICE_BYTES = 4 << 20
"""What a thread reads at once: little enough to stay in its core's cache on the way."""
MAX_THREADS = 12
CHUNK_BYTES = 256 << 20
CHUNKS = 3
"""Pieces that land beside by a library's threads: with fewer, or smaller ones, they run dry."""
AHEAD_BYTES = 4 << 30
"""What a library's threads are given ahead: a tenth of a second's work, should Python be busy."""


class Transfer(ABC):
    """A context in which runs are begun in their order, a few at a time, and ended in the same.

    Attributes:
        cut: how it likes its runs.
    """

    cut: ReadLimits

    def __init__(self) -> None:
        self._opened = ExitStack()
        self._files: dict[Path, int] = {}

    @abstractmethod
    def has_room(self, under_way: Collection[ReadRange]) -> bool:
        """Whether another run can be begun beside those that have not yet been ended."""

    @abstractmethod
    def begin(self, run: ReadRange) -> Any:
        """Have a run read; what is returned goes to `end`.

        Raises:
            WeightsError: its file cannot be opened.
        """

    @abstractmethod
    def end(self, run: ReadRange, begun: Any) -> None:
        """Wait until a run is read, and hand its elements on to their tensors.

        What the device is given to do afterwards, in its current stream, sees them.

        Raises:
            WeightsError: it cannot be read, or the file has become shorter.
        """

    @abstractmethod
    def finish(self) -> None:
        """Wait for whatever is under way, after an error as well: memory in use must not go."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        with self._opened:
            self.finish()

    def _open(self, file: Path) -> int:
        if file not in self._files:
            try:
                number = os.open(file, os.O_RDONLY)
            except OSError as error:
                raise _unreadable(file, error.strerror or str(error)) from error
            self._files[file] = number
            self._opened.callback(os.close, number)
        return self._files[file]


class HostTransfer(Transfer):
    """Into the host's own memory."""

    def __init__(self, *, run_bytes: int = BUFFER_BYTES, gather_bytes: int = SMALL_BYTES) -> None:
        super().__init__()
        self.cut = ReadLimits(run_bytes, gather_bytes)
        self._readers = _Readers()

    def has_room(self, under_way: Collection[ReadRange]) -> bool:
        return len(under_way) < BUFFERS  # as many as the other way has, though nothing is buffered

    def begin(self, run: ReadRange) -> tuple[Tensor, list[Future[None]]]:
        target = run.in_place
        data = (
            torch.empty(run.nbytes, dtype=torch.uint8)
            if target is None
            else target.view(torch.uint8)
        )
        return data, self._readers.begin(self._open(run.file), run, data)

    def end(self, run: ReadRange, begun: tuple[Tensor, list[Future[None]]]) -> None:
        data, reads = begun
        for each in reads:
            each.result()
        if run.in_place is None:
            deliver(data, run)

    def finish(self) -> None:
        self._readers.finish()


class PinnedTransfer(Transfer):
    """Through pinned buffers and a stream; on the host (for tests) the buffers are not pinned.

    What has to be parted or converted takes a buffer on the device, too.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        run_bytes: int = BUFFER_BYTES,
        gather_bytes: int = SMALL_BYTES,
    ) -> None:
        super().__init__()
        self.cut = ReadLimits(run_bytes, gather_bytes)
        self._device = device
        self._backend: Any = None if device.type == "cpu" else torch.get_device_module(device)
        self._readers = _Readers()
        self._buffers: list[tuple[Tensor, Any]] = []
        self._turn = cycle(range(BUFFERS))
        if self._backend is None:
            return
        self._landing = torch.empty(run_bytes, dtype=torch.uint8, device=device)
        self._stream = self._backend.Stream(device)

    def __enter__(self) -> Self:
        if self._backend is not None:  # memory is pinned for the current one
            self._opened.enter_context(self._backend.device(self._device))
        return self

    def has_room(self, under_way: Collection[ReadRange]) -> bool:
        return len(under_way) < BUFFERS - 1  # one is on its way

    def begin(self, run: ReadRange) -> tuple[Tensor, Any, list[Future[None]]]:
        """Read into the buffer that was sent off first, once it has arrived."""
        file, turn = self._open(run.file), next(self._turn)
        if turn == len(self._buffers):  # while others are being read, as pinning takes its time
            self._buffers.append(self._new_buffer())
        buffer, sent = self._buffers[turn]
        if sent is not None:
            sent.synchronize()
        data = buffer[: run.nbytes]
        return data, sent, self._readers.begin(file, run, data)

    def end(self, run: ReadRange, begun: tuple[Tensor, Any, list[Future[None]]]) -> None:
        data, sent, reads = begun
        for each in reads:
            each.result()
        if self._backend is None:
            deliver(data, run)
            return
        # Memory that tensors were given may have been freed under work that still runs.
        self._stream.wait_stream(self._backend.current_stream(self._device))
        with self._backend.stream(self._stream):
            if run.in_place is None:
                data = self._landing[: data.numel()].copy_(data, non_blocking=True)
            deliver(data, run)
            sent.record(self._stream)
        self._backend.current_stream(self._device).wait_event(sent)

    def finish(self) -> None:
        self._readers.finish()
        if self._backend is not None:
            self._stream.synchronize()

    def _new_buffer(self) -> tuple[Tensor, Any]:
        """A buffer, and the event of its arrival."""
        pin = self._backend is not None
        buffer = torch.empty(self.cut.run_bytes, dtype=torch.uint8, pin_memory=pin)
        return buffer, self._backend.Event() if pin else None


class FastSafetensorsTransfer(Transfer):
    """By a library's threads, large tensors straight to where they are wanted.

    What has to be converted lands beside it first. Small tensors, whose number is what costs, are
    read by this thread while the others are busy, many at once, and parted on the device. Runs are
    begun far ahead, so that whoever takes what is wanted must not wait for the first to arrive.
    """

    def __init__(
        self,
        device: torch.device,
        reader: FileReader,
        *,
        run_bytes: int = CHUNK_BYTES,
        gather_bytes: int = SMALL_BYTES,
    ) -> None:
        super().__init__()
        self.cut = ReadLimits(run_bytes, gather_bytes, join=True)
        self._device, self._reader = device, reader
        self._under_way: dict[int, Tensor | None] = {}

    def has_room(self, under_way: Collection[ReadRange]) -> bool:
        landing = sum(run.address is None and not run.gathered for run in under_way)
        return landing < CHUNKS and sum(run.nbytes for run in under_way) < AHEAD_BYTES

    def begin(self, run: ReadRange) -> int | None:
        file = self._open(run.file)
        if run.gathered:
            return None  # read by this thread, which had better give the others something first
        landing, address = None, run.address
        if address is None:
            landing = torch.empty(run.nbytes, dtype=torch.uint8, device=self._device)
            address = landing.data_ptr()
        # The reader waits for work that may still use this memory if it was someone else's.
        number = self._reader.begin(file, run.spans[0].start, run.nbytes, address)
        self._under_way[number] = landing
        return number

    def end(self, run: ReadRange, begun: int | None) -> None:
        arrived, data = False, None
        if begun is not None:
            arrived = self._reader.wait(begun)
            data = self._under_way.pop(begun)
        if not arrived:  # the reader does not tell why, and takes a short read for a failed one
            data = _read_whole(self._files[run.file], run).to(self._device)
        if data is not None:
            deliver(data, run)

    def finish(self) -> None:
        for number in self._under_way:
            self._reader.wait(number)
        self._under_way.clear()
        if self._device.type != "cpu":
            torch.get_device_module(self._device).current_stream(self._device).synchronize()


class _Readers:
    """Python threads that read runs, in slices, into the host's memory."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(min(MAX_THREADS, torch.get_num_threads()), "reader")

    def finish(self) -> None:
        """Read no more than what is being read."""
        self._pool.shutdown(cancel_futures=True)

    def begin(self, file: int, run: ReadRange, data: Tensor) -> list[Future[None]]:
        view = data.numpy().data
        return [
            self._pool.submit(_read_slice, file, run, span.start + first, view[at : at + count])
            for span in run.spans
            for first in range(0, span.nbytes, SLICE_BYTES)
            for at, count in [(span.at + first, min(SLICE_BYTES, span.nbytes - first))]
        ]


def _read_whole(file: int, run: ReadRange) -> Tensor:
    """A run's bytes, [bytes] uint8, read by this thread into the host's memory."""
    data = torch.empty(run.nbytes, dtype=torch.uint8)
    view = data.numpy().data
    for span in run.spans:
        _read_slice(file, run, span.start, view[span.at : span.at + span.nbytes])
    return data


def _read_slice(file: int, run: ReadRange, start: int, view: memoryview) -> None:
    done = 0
    while done < len(view):
        try:
            count = os.preadv(file, [view[done:]], start + done)
        except OSError as error:
            raise _unreadable(run.file, error.strerror or str(error)) from error
        if count == 0:
            raise _cut_off(file, run)
        done += count


def _cut_off(file: int, run: ReadRange) -> WeightsError:
    size = os.fstat(file).st_size  # and not where this read ended: it may lie far behind
    lacking = [piece for piece in run.pieces if piece.start + piece.nbytes > size]
    if not lacking:
        return _unreadable(run.file, "it was being written")
    first = min(lacking, key=lambda piece: piece.start).stored
    place = "within" if first.start < size else "before"
    return WeightsError(
        f"{run.file} ends after {size:,} bytes, {place} tensor {first.name!r}: the file was cut; "
        "copy or convert it again"
    )


def _unreadable(file: Path, reason: str) -> WeightsError:
    return WeightsError(f"{file} cannot be read: {reason}")
