"""Move bytes from files into the memory of one device."""

from __future__ import annotations

import ctypes
import logging
import os
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

BUFFER_BYTES = 16 << 20
BUFFERS = 6
SLICE_BYTES = 4 << 20
"""What a thread reads at once: little enough to stay in its core's cache on the way."""
MAX_THREADS = 12


class Transfer(Protocol):
    """Fills tensors of one device with bytes of open files, several tensors at a time.

    Attributes:
        chunk_bytes: the most that one `begin` takes.
        most_in_flight, most_bytes: another `begin` is welcome below both.
    """

    chunk_bytes: int
    most_in_flight: int
    most_bytes: int

    def begin(self, file: int, start: int, target: Tensor) -> Any:
        """Begin to fill a flat tensor from byte `start` of an open file on, for `finish`."""

    def finish(self, begun: Any) -> None:
        """Wait for what was begun first. Work that the device is given from then on sees the bytes.

        Raises:
            OSError: the file cannot be read.
            EOFError: it ends too early.
        """

    def close(self) -> None:
        """Wait for what is in flight, also after an error: memory in use must not be freed."""


class ThreadTransfer(Transfer):
    """Python's threads read: on the CPU into the target, else into pinned buffers.

    A stream copies these to the device, which reads host memory at full speed only where it is
    pinned, and the page cache is not.
    """

    chunk_bytes = BUFFER_BYTES
    most_in_flight = BUFFERS - 1  # one more is being copied
    most_bytes = BUFFERS * BUFFER_BYTES

    def __init__(self, device: torch.device, *, buffered: bool = False) -> None:
        """buffered: use buffers on the CPU, too, which tests do."""
        self._device = device
        self._backend: Any = None if device.type == "cpu" else torch.get_device_module(device)
        self._stream: Any = None if self._backend is None else self._backend.Stream(device)
        self._buffered = buffered or self._backend is not None
        self._free: list[tuple[Tensor, Any]] = []  # buffers, each with the event of its copy
        self._made = 0
        self._pool = ThreadPoolExecutor(min(MAX_THREADS, torch.get_num_threads()), "reader")

    def begin(self, file: int, start: int, target: Tensor) -> Any:
        buffer, copied = self._take_buffer() if self._buffered else (target, None)
        view = memory_of(buffer)[: target.nbytes]
        reads = [
            self._pool.submit(read_bytes, file, start + at, view[at : at + SLICE_BYTES])
            for at in range(0, len(view), SLICE_BYTES)
        ]
        return target, buffer, copied, reads

    def finish(self, begun: tuple[Tensor, Tensor, Any, list[Future[None]]]) -> None:
        target, buffer, copied, reads = begun
        for read in reads:
            read.result()
        if not self._buffered:
            return
        source = buffer[: target.nbytes].view(target.dtype)
        if self._backend is None:
            target.copy_(source)
        else:
            current = self._backend.current_stream(self._device)
            self._stream.wait_stream(current)  # queued work may still use this memory
            with self._backend.stream(self._stream):
                target.copy_(source, non_blocking=True)
                copied.record(self._stream)
            current.wait_event(copied)
        self._free.append((buffer, copied))

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        if self._stream is not None:
            self._stream.synchronize()

    def _take_buffer(self) -> tuple[Tensor, Any]:
        if self._made < BUFFERS:  # one by one, while others are being read: pinning takes its time
            self._made += 1
            if self._backend is None:
                return torch.empty(self.chunk_bytes, dtype=torch.uint8), None
            with self._backend.device(self._device):  # memory is pinned for the current device
                buffer = torch.empty(self.chunk_bytes, dtype=torch.uint8, pin_memory=True)
                return buffer, self._backend.Event()
        buffer, copied = self._free.pop(0)
        if copied is not None:
            copied.synchronize()
        return buffer, copied


class FastSafetensorsTransfer(Transfer):
    """The threads of fastsafetensors read and copy, without Python's lock (docs/decisions/013).

    Each has two pinned buffers: one is filled, the other is being copied.
    """

    chunk_bytes = 256 << 20
    most_in_flight = 1024
    most_bytes = 4 << 30  # a tenth of a second's work, should Python be busy
    threads = 12
    buffer_bytes = 4 << 20  # all of them together stay in the processor's cache on the way

    def __init__(self, device: torch.device) -> None:
        """Pin the buffers and start the threads, which takes some 50 ms. The host is for tests.

        Raises:
            ImportError: fastsafetensors is not installed, or not for this Python.
            RuntimeError: it does not find CUDA.
        """
        # Of the extra `cuda`: elsewhere it need not be installed.
        from fastsafetensors import cpp  # noqa: PLC0415

        self._library: Any = cpp
        self._on_card = device.type == "cuda"
        if self._on_card:
            version = (torch.version.cuda or "").partition(".")[0]
            cpp.load_library_functions(f"libcudart.so.{version}")  # the one that torch has loaded
            if not cpp.is_cuda_found():
                raise RuntimeError(f"fastsafetensors does not find libcudart.so.{version}")
        cpp.set_gil_release(True)
        size = 2 * self.threads * self.buffer_bytes >> 10
        index = device.index if self._on_card else -1
        self._reader: Any = cpp.nogds_file_reader(False, size, self.threads, self._on_card, index)
        self._in_flight: dict[int, Tensor] = {}

    def begin(self, file: int, start: int, target: Tensor) -> tuple[int, int, int]:
        memory = self._library.gds_device_buffer(target.data_ptr(), target.nbytes, self._on_card)
        # It waits for work that may still use this memory.
        number: int = self._reader.submit_read(file, memory, start, target.nbytes, 0)
        self._in_flight[number] = target
        return number, file, start

    def finish(self, begun: tuple[int, int, int]) -> None:
        number, file, start = begun
        arrived = self._reader.wait_read(number)
        target = self._in_flight.pop(number)
        if not arrived:
            # It does not say why, and takes a short read for a failed one: network file systems
            # have such.
            data = torch.empty_like(target, device="cpu")
            read_bytes(file, start, memory_of(data))
            target.copy_(data)

    def close(self) -> None:
        while self._in_flight:
            self._reader.wait_read(self._in_flight.popitem()[0])


@lru_cache(maxsize=8)
def fastsafetensors(device: torch.device) -> FastSafetensorsTransfer | None:
    """The process' transfer to an NVIDIA card, made once; None where the library is not there."""
    if device.type != "cuda" or torch.version.cuda is None:
        return None
    try:
        return FastSafetensorsTransfer(device)
    except (ImportError, RuntimeError) as error:
        logger.info("%s: weights are read by Python's threads, which takes longer", error)
        return None


def fastest_transfer(device: torch.device) -> Transfer:
    """The fastest transfer to a device that this process has."""
    return fastsafetensors(device) or ThreadTransfer(device)


def memory_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the host; the caller keeps the tensor."""
    return memoryview((ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")


def read_bytes(file: int, start: int, view: memoryview) -> None:
    """Fill `view` from an open file.

    Raises:
        OSError: the file cannot be read.
        EOFError: it ends before `view` is full.
    """
    done = 0
    while done < len(view):
        count = os.preadv(file, [view[done:]], start + done)
        if count == 0:
            raise EOFError
        done += count
