"""Copies tensors from files to where they are wanted, as fast as the way there allows.

A device reads host memory at full speed only where it is pinned, and pages of a mapped file are
not. So a few threads read pieces of the files into small pinned buffers of their own, two each, and
send one off while they fill the other. To the CPU they read in place. Tensors much smaller than a
buffer travel together and are parted at their destination; what is stored in another dtype than
wanted is converted there. No whole tensor is ever held on the host on its way to a device.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import chain, cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quant.errors import WeightsError
from quant.safetensors_header import StoredTensor

BUFFER_BYTES = 8 << 20
MAX_THREADS = 8
_ALIGNMENT = 16  # what any dtype's view of a buffer may ask for
_GAP_BYTES = 64 << 10  # what is read in vain rather than asked for in two pieces

Wanted = tuple[StoredTensor, Tensor]
"""A tensor in a file, and the contiguous tensor of the same shape that is to hold it."""


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
        threads: int | None = None,
        buffer_bytes: int = BUFFER_BYTES,
        staged: bool | None = None,
    ) -> None:
        """Prepare to copy; buffers are made when something is copied.

        Args:
            threads: readers; by default as many as torch computes with, eight at most.
            staged: whether data passes through buffers; by default wherever the device is not the
                host itself.
        """
        if device.type != "cpu" and device.index is None:
            # Which card is the current one is known to each thread for itself.
            index = torch.get_device_module(device).current_device()
            device = torch.device(device.type, index)
        self.device = device
        self.threads = threads or min(MAX_THREADS, torch.get_num_threads())
        self.buffer_bytes = buffer_bytes
        self.staged = device.type != "cpu" if staged is None else staged

    def read(self, wanted: Iterable[Wanted]) -> int:
        """Fill every wanted tensor and return the number of bytes read, when all have arrived.

        `wanted` is taken little by little, so that tensors may be allocated meanwhile. In the order
        of the files it goes fastest.

        Raises:
            WeightsError: a file cannot be read or ends early; it names the tensor.
        """
        runs = _Shared(_runs(wanted, self.buffer_bytes))
        with ThreadPoolExecutor(self.threads, "weights") as pool:
            done = [pool.submit(self._work, runs) for _ in range(self.threads)]
        return sum(each.result() for each in done)

    def _work(self, runs: _Shared) -> int:
        total = 0
        with ExitStack() as opened:
            files: dict[Path, int] = {}
            lane = _Lane(self.device, self.buffer_bytes) if self.staged else None
            try:
                for run in runs:
                    if run.file not in files:
                        files[run.file] = os.open(run.file, os.O_RDONLY)
                        opened.callback(os.close, files[run.file])
                    total += self._copy(run, files[run.file], lane)
            except OSError as error:
                runs.stop()
                raise WeightsError(
                    f"{run.file} cannot be read: {error.strerror or error}"
                ) from error
            except BaseException:
                runs.stop()
                raise
            finally:
                if lane is not None:
                    lane.finish()
        return total

    def _copy(self, run: _Run, file: int, lane: _Lane | None) -> int:
        target = run.in_place
        if lane is not None:
            buffer = lane.free_buffer()[: run.end - run.start]
            _read_whole(file, run, buffer)
            lane.send(buffer, run)
        elif target is not None:
            _read_whole(file, run, _as_bytes(target))
        else:
            buffer = torch.empty(run.end - run.start, dtype=torch.uint8)
            _read_whole(file, run, buffer)
            _part(buffer, run)
        return run.end - run.start


class _Shared:
    """One iterator for several threads, which any of them may end for all."""

    def __init__(self, runs: Iterator[_Run]) -> None:
        self._runs = runs
        self._lock = threading.Lock()

    def __iter__(self) -> Iterator[_Run]:
        while True:
            with self._lock:
                run = next(self._runs, None)
            if run is None:
                return
            yield run

    def stop(self) -> None:
        with self._lock:
            self._runs = iter(())


class _Lane:
    """One thread's way to a device: two pinned buffers, a stream, and a buffer on the device."""

    def __init__(self, device: torch.device, buffer_bytes: int) -> None:
        self._buffers: Iterator[tuple[Tensor, Any]]
        self._sent: Any = None
        self._backend: Any = None if device.type == "cpu" else torch.get_device_module(device)
        pin = self._backend is not None
        if self._backend is not None:
            self._backend.set_device(device)
        buffers = [torch.empty(buffer_bytes, dtype=torch.uint8, pin_memory=pin) for _ in range(2)]
        self._landing = torch.empty(buffer_bytes, dtype=torch.uint8, device=device)
        if self._backend is None:
            self._buffers = cycle([(buffer, None) for buffer in buffers])
            return
        self._stream = self._backend.Stream(device)
        # Memory that tensors were given may have been freed under work that still runs.
        self._stream.wait_stream(self._backend.current_stream(device))
        self._buffers = cycle([(buffer, self._backend.Event()) for buffer in buffers])

    def free_buffer(self) -> Tensor:
        """The buffer whose last load has arrived."""
        buffer, self._sent = next(self._buffers)
        if self._sent is not None:
            self._sent.synchronize()
        return buffer

    def send(self, buffer: Tensor, run: _Run) -> None:
        """Send the buffer that `free_buffer` gave; it is busy until its event has come."""
        if self._backend is None:
            self._deliver(buffer, run)
            return
        with self._backend.stream(self._stream):
            self._deliver(buffer, run)
            self._sent.record(self._stream)

    def finish(self) -> None:
        """Wait until all has arrived."""
        if self._backend is not None:
            self._stream.synchronize()

    def _deliver(self, buffer: Tensor, run: _Run) -> None:
        target = run.in_place
        if target is not None:
            target.view(torch.uint8).copy_(buffer, non_blocking=True)
            return
        landed = self._landing[: buffer.numel()]
        landed.copy_(buffer, non_blocking=True)
        _part(landed, run)


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


def _part(buffer: Tensor, run: _Run) -> None:
    """Give each piece of a run its elements, in the dtype it is wanted in."""
    for stored, first_byte, target in run.pieces:
        start = first_byte - run.start
        data = buffer[start : start + _size(stored, target)]
        if start % stored.dtype.itemsize:
            data = data.clone()  # a view of another dtype has to begin at a multiple of its size
        target.copy_(data.view(stored.dtype), non_blocking=True)


def _read_whole(file: int, run: _Run, buffer: Tensor) -> None:
    view = _as_bytes(buffer).numpy().data
    done = 0
    while done < len(view):
        count = os.preadv(file, [view[done:]], run.start + done)
        if count == 0:
            end = run.start + done
            cut = next(each for each, first, to in run.pieces if first + _size(each, to) > end)
            raise WeightsError(
                f"{run.file} ends after {end:,} bytes, within tensor {cut.name!r}: the file was "
                "cut; copy or convert it again"
            )
        done += count


def _size(stored: StoredTensor, target: Tensor) -> int:
    """The bytes in a file that fill `target`."""
    return target.numel() * stored.dtype.itemsize


def _as_bytes(flat: Tensor) -> Tensor:
    return flat.view(torch.uint8)
