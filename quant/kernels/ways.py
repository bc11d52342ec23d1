"""The ways that bytes of files take into tensors; `Copier` takes the best that a device has.

- Into the host's memory, threads read in place, or beside it where something has to be converted.
- A device reads host memory at full speed only where it is pinned, and pages of a file are not. So
  threads read a piece of a file into a pinned buffer, which is sent off while they read the next.
- To an NVIDIA card with fastsafetensors installed, its threads do the same without Python's lock,
  for large pieces of files whose tensors are parted on the card.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from itertools import cycle
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from quant.errors import WeightsError
from quant.kernels.file_reader import FileReader
from quant.kernels.runs import Run, deliver, size_in_file

BUFFER_BYTES = 16 << 20
BUFFERS = 6
SLICE_BYTES = 4 << 20
"""What a thread reads at once: little enough to stay in its core's cache on the way."""
MAX_THREADS = 12
CHUNK_BYTES = 256 << 20
CHUNKS = 3
"""Pieces under way by a library's threads: with fewer, or smaller ones, they run out of work."""


class Way(ABC):
    """A context in which runs are begun in their order, a few at a time, and ended in the same.

    Attributes:
        run_bytes: what a run holds at most.
        depth: how many are under way at most: begun, and not yet ended.
    """

    run_bytes: int
    depth: int

    def __init__(self) -> None:
        self._opened = ExitStack()
        self._files: dict[Path, int] = {}

    @abstractmethod
    def begin(self, run: Run) -> Any:
        """Have a run read; what is returned goes to `end`.

        Raises:
            WeightsError: its file cannot be opened.
        """

    @abstractmethod
    def end(self, begun: Any) -> None:
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


class InPlace(Way):
    """Into the host's own memory."""

    depth = BUFFERS  # as many as the other way has, though here nothing is buffered

    def __init__(self, *, run_bytes: int = BUFFER_BYTES) -> None:
        super().__init__()
        self.run_bytes = run_bytes
        self._readers = _Readers()

    def begin(self, run: Run) -> tuple[Run, Tensor, list[Future[None]]]:
        size = run.end - run.start
        target = run.in_place
        data = torch.empty(size, dtype=torch.uint8) if target is None else target.view(torch.uint8)
        return run, data, self._readers.begin(self._open(run.file), run, data)

    def end(self, begun: tuple[Run, Tensor, list[Future[None]]]) -> None:
        run, data, reads = begun
        for each in reads:
            each.result()
        if run.in_place is None:
            deliver(data, run)

    def finish(self) -> None:
        self._readers.finish()


class ByPinnedBuffers(Way):
    """Through pinned buffers and a stream; on the host (for tests) the buffers are not pinned.

    What has to be parted or converted takes a buffer on the device, too.
    """

    depth = BUFFERS - 1  # one is on its way

    def __init__(self, device: torch.device, *, run_bytes: int = BUFFER_BYTES) -> None:
        super().__init__()
        self.run_bytes = run_bytes
        self._device = device
        self._backend: Any = None if device.type == "cpu" else torch.get_device_module(device)
        self._readers = _Readers()
        self._buffers: list[tuple[Tensor, Any]] = []
        self._turn = cycle(range(BUFFERS))
        if self._backend is None:
            return
        self._landing = torch.empty(run_bytes, dtype=torch.uint8, device=device)
        self._stream = self._backend.Stream(device)
        # Memory that tensors were given may have been freed under work that still runs.
        self._stream.wait_stream(self._backend.current_stream(device))

    def __enter__(self) -> Self:
        if self._backend is not None:  # memory is pinned for the current one
            self._opened.enter_context(self._backend.device(self._device))
        return self

    def begin(self, run: Run) -> tuple[Run, Tensor, Any, list[Future[None]]]:
        """Read into the buffer that was sent off first, once it has arrived."""
        file, turn = self._open(run.file), next(self._turn)
        if turn == len(self._buffers):  # while others are being read, as pinning takes its time
            self._buffers.append(self._new_buffer())
        buffer, sent = self._buffers[turn]
        if sent is not None:
            sent.synchronize()
        data = buffer[: run.end - run.start]
        return run, data, sent, self._readers.begin(file, run, data)

    def end(self, begun: tuple[Run, Tensor, Any, list[Future[None]]]) -> None:
        run, data, sent, reads = begun
        for each in reads:
            each.result()
        if self._backend is None:
            deliver(data, run)
            return
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
        buffer = torch.empty(self.run_bytes, dtype=torch.uint8, pin_memory=pin)
        return buffer, self._backend.Event() if pin else None


class ByFileReader(Way):
    """By a library's threads, into memory of the device that tensors are then copied out of.

    That copy takes a few percent of what the way there takes, and lets all tensors, large and
    small, be read in pieces that are large.
    """

    depth = CHUNKS

    def __init__(
        self, device: torch.device, reader: FileReader, *, run_bytes: int = CHUNK_BYTES
    ) -> None:
        super().__init__()
        self.run_bytes = run_bytes
        self._device, self._reader = device, reader
        self._under_way: dict[int, Tensor] = {}

    def begin(self, run: Run) -> tuple[Run, int]:
        file = self._open(run.file)
        # The reader waits for work that may still use this memory if it was someone else's.
        landing = torch.empty(run.end - run.start, dtype=torch.uint8, device=self._device)
        number = self._reader.begin(file, run.start, landing)
        self._under_way[number] = landing
        return run, number

    def end(self, begun: tuple[Run, int]) -> None:
        run, number = begun
        arrived = self._reader.wait(number)
        data = self._under_way.pop(number)
        if not arrived:  # the reader does not tell why, and takes a short read for a failed one
            again = torch.empty(data.numel(), dtype=torch.uint8)
            _read_slice(self._files[run.file], run, again.numpy().data, 0)
            data.copy_(again)
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

    def begin(self, file: int, run: Run, data: Tensor) -> list[Future[None]]:
        view = data.numpy().data
        return [
            self._pool.submit(_read_slice, file, run, view[start : start + SLICE_BYTES], start)
            for start in range(0, len(view), SLICE_BYTES)
        ]


def _read_slice(file: int, run: Run, view: memoryview, first: int) -> None:
    done = 0
    while done < len(view):
        try:
            count = os.preadv(file, [view[done:]], run.start + first + done)
        except OSError as error:
            raise _unreadable(run.file, error.strerror or str(error)) from error
        if count == 0:
            raise _cut_off(run, run.start + first + done)
        done += count


def _cut_off(run: Run, end: int) -> WeightsError:
    cut = next(each for each, at, to in run.pieces if at + size_in_file(each, to) > end)
    return WeightsError(
        f"{run.file} ends after {end:,} bytes, within tensor {cut.name!r}: the file was cut; copy "
        "or convert it again"
    )


def _unreadable(file: Path, reason: str) -> WeightsError:
    return WeightsError(f"{file} cannot be read: {reason}")
