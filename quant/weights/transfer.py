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

BUFFERS = 6
SLICE_BYTES = 4 << 20
"""What a thread reads at once: small enough to stay in its core's cache until it is copied."""
MAX_THREADS = 12


class Transfer(Protocol):
    """Fills tensors of one device with bytes of open files, several tensors at a time.

    Attributes:
        chunk_bytes: the most that one `begin` may read.
        most_in_flight, most_bytes: call `begin` only while fewer reads and bytes are in flight.
    """

    chunk_bytes: int
    most_in_flight: int
    most_bytes: int

    def begin(self, file: int, start: int, target: Tensor) -> Any:
        """Start to fill a flat tensor from byte `start` of a file; pass the result to `finish`."""

    def finish(self, begun: Any) -> None:
        """Wait for the oldest read; device work that is enqueued after this sees the bytes.

        Raises:
            OSError: the file cannot be read.
            EOFError: the file ends before the tensor is full.
        """

    def close(self) -> None:
        """Wait for all reads in flight, also after an error: their memory may then be freed."""


class ThreadTransfer(Transfer):
    """Reads with Python threads: on the CPU into the target, else into pinned buffers.

    A stream copies the buffers to the device. Devices read host memory at full speed only if it is
    pinned; the page cache is not.
    """

    chunk_bytes = 16 << 20
    most_in_flight = BUFFERS - 1  # one more is being copied
    most_bytes = BUFFERS * chunk_bytes

    def __init__(self, device: torch.device, *, buffered: bool = False) -> None:
        """Create the threads; `buffered` uses buffers on the CPU, too, for tests."""
        self._device = device
        self._backend: Any = None if device.type == "cpu" else torch.get_device_module(device)
        self._stream: Any = None if self._backend is None else self._backend.Stream(device)
        self._buffered = buffered or self._backend is not None
        self._free: list[tuple[Tensor, Any]] = []  # buffers, each with the event of its copy
        self._made = 0
        self._pool = ThreadPoolExecutor(min(MAX_THREADS, torch.get_num_threads()), "reader")

    def begin(self, file: int, start: int, target: Tensor) -> Any:
        buffer, copied = self._take_buffer() if self._buffered else (target, None)
        view = bytes_of(buffer)[: target.nbytes]
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
        if self._made < BUFFERS:  # pinning is slow: the first reads run meanwhile
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
    """Reads with the threads of fastsafetensors, without Python's lock (docs/decisions/013).

    Each thread fills one of its two pinned buffers while the other is copied.
    """

    chunk_bytes = 256 << 20
    most_in_flight = 1024
    most_bytes = 4 << 30  # about 0.1 s of copying, for when Python is busy

    def __init__(self, device: torch.device, threads: tuple[Any, Any]) -> None:
        """Use `threads`, which `fastsafetensors` started for the device."""
        self._library, self._reader = threads
        self._on_gpu = device.type == "cuda"
        self._in_flight: dict[int, Tensor] = {}

    def begin(self, file: int, start: int, target: Tensor) -> tuple[int, int, int]:
        memory = self._library.gds_device_buffer(target.data_ptr(), target.nbytes, self._on_gpu)
        # It waits for work that may still use this memory.
        number: int = self._reader.submit_read(file, memory, start, target.nbytes, 0)
        self._in_flight[number] = target
        return number, file, start

    def finish(self, begun: tuple[int, int, int]) -> None:
        number, file, start = begun
        arrived = self._reader.wait_read(number)
        target = self._in_flight.pop(number)
        if not arrived:
            # The library gives no reason, and treats a short read, which network file systems
            # may return, as a failure. So read again, with errors of our own.
            data = torch.empty_like(target, device="cpu")
            read_bytes(file, start, bytes_of(data))
            target.copy_(data)

    def close(self) -> None:
        for number in self._in_flight:
            self._reader.wait_read(number)
        self._in_flight.clear()


@lru_cache(maxsize=8)
def fastsafetensors(device: torch.device) -> tuple[Any, Any] | None:
    """Start the library's threads for a device, once for the process; takes about 50 ms.

    Returns the library and its threads for `FastSafetensorsTransfer`, or None without the library.
    A CPU device is accepted for tests only.
    """
    if device.type == "npu" or (device.type == "cuda" and torch.version.cuda is None):
        return None
    try:
        from fastsafetensors import cpp  # noqa: PLC0415  # of the extra `cuda`

        on_gpu = device.type == "cuda"
        if on_gpu:
            version = (torch.version.cuda or "").partition(".")[0]
            cpp.load_library_functions(f"libcudart.so.{version}")  # the one that torch has loaded
            if not cpp.is_cuda_found():
                raise RuntimeError(f"fastsafetensors does not find libcudart.so.{version}")
        cpp.set_gil_release(True)
        buffers_kib = 2 * MAX_THREADS * SLICE_BYTES >> 10
        index = device.index if on_gpu else -1
        return cpp, cpp.nogds_file_reader(False, buffers_kib, MAX_THREADS, on_gpu, index)
    except (ImportError, RuntimeError) as error:
        logger.info("%s: weights are read by Python's threads, which takes longer", error)
        return None


def fastest_transfer(device: torch.device) -> Transfer:
    """Return the fastest transfer to a device that this process can use."""
    threads = None if device.type == "cpu" else fastsafetensors(device)
    if threads is not None:
        return FastSafetensorsTransfer(device, threads)
    return ThreadTransfer(device)


def bytes_of(tensor: Tensor) -> memoryview:
    """Return a view of a contiguous host tensor's bytes; the caller must keep the tensor."""
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
