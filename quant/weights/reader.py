"""Read stored tensors into tensors of one device, at once or in a background thread.

A large tensor is read in slices, so the host never holds a whole one. A tensor that is stored in
another dtype than wanted is converted on the device. Small tensors are read together, because each
read takes Python's interpreter lock several times.
"""

from __future__ import annotations

import os
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from itertools import groupby
from pathlib import Path
from threading import Condition, Event
from typing import Self

import torch
from torch import Tensor
from torch._utils import _unflatten_dense_tensors

from quant.errors import WeightsError
from quant.weights.header import StoredTensor
from quant.weights.transfer import Transfer, bytes_of, fastest_transfer, fastsafetensors, read_bytes

GAP_BYTES = 64 << 10
"""Small tensors with at most this gap between them are read at once, with the gap."""
CONVERTED_BYTES = 768 << 20
"""At most about so much on the device waits to be converted from its stored dtype."""

ReadRequest = tuple[StoredTensor, Tensor]
"""A tensor in a file, and the contiguous tensor of the same shape to read it into."""


class TensorReader:
    """Reads stored tensors into tensors of one device."""

    def __init__(
        self, device: torch.device, transfer: Callable[[], Transfer] | None = None
    ) -> None:
        """Prepare to read to `device`; `transfer` makes the transfer, by default the fastest."""
        if device.type != "cpu" and device.index is None:
            # Each thread has a current device of its own.
            index = torch.get_device_module(device).current_device()
            device = torch.device(device.type, index)
        self.device = device
        self._make_transfer = transfer or partial(fastest_transfer, device)

    def prepare(self) -> None:
        """Start the threads that the first `read` to an NVIDIA GPU would otherwise start."""
        if self.device.type != "cpu":
            fastsafetensors(self.device)

    @torch.no_grad()
    def read(
        self, wanted: Iterable[ReadRequest], arrived: Callable[[list[Tensor]], object] = id
    ) -> None:
        """Fill every wanted tensor; return when all are filled. Fastest in the order of the files.

        Args:
            arrived: called with tensors as they arrive: device work that is enqueued after the
                call sees them filled.

        Raises:
            WeightsError: a file cannot be read or has become shorter; it names the tensor.
        """
        in_flight: deque[_Slice] = deque()
        with ExitStack() as files, ExitStack() as running:

            @cache
            def open_file(path: Path) -> int:
                with _explained(path):
                    number = os.open(path, os.O_RDONLY)
                files.callback(os.close, number)
                return number

            def finish_first() -> None:
                arrived(in_flight[0].finish())
                in_flight.popleft()

            transfer = self._make_transfer()
            running.callback(transfer.close)  # before the files it reads
            for requests in _groups(wanted):
                (stored, target), file = requests[0], open_file(requests[0][0].file)
                if stored.is_small:
                    _read_small(file, requests)
                    arrived([target for _, target in requests])
                    continue
                count = max(transfer.chunk_bytes // stored.dtype.itemsize, 1)
                for first in range(0, target.numel(), count):
                    while in_flight and not _has_room(transfer, in_flight):
                        finish_first()
                    in_flight.append(_Slice(transfer, file, (stored, target), first, count))
            while in_flight:
                finish_first()
        if self.device.type != "cpu":
            torch.get_device_module(self.device).current_stream(self.device).synchronize()


class _Slice:
    """At most `count` elements of a large tensor, from element `first` on, being read."""

    def __init__(
        self, transfer: Transfer, file: int, request: ReadRequest, first: int, count: int
    ) -> None:
        self._transfer, self._file, (self._stored, self._target) = transfer, file, request
        self._part = self._target.detach().view(-1)[first : first + count]
        self._is_last = first + count >= self._target.numel()
        self.nbytes = self._part.numel() * self._stored.dtype.itemsize
        self.converts = self._target.dtype is not self._stored.dtype
        self._landing = self._part
        if self.converts:
            self._landing = torch.empty_like(self._part, dtype=self._stored.dtype)
        start = self._stored.start + first * self._stored.dtype.itemsize
        self._begun = transfer.begin(file, start, self._landing)

    def finish(self) -> list[Tensor]:
        """Wait until the slice is read; return the target if it was the last slice of it."""
        with _explained(self._stored.file, self._file, [self._stored]):
            self._transfer.finish(self._begun)
        if self.converts:
            self._part.copy_(self._landing, non_blocking=True)
        return [self._target] if self._is_last else []


def _has_room(transfer: Transfer, in_flight: Collection[_Slice]) -> bool:
    begun = sum(each.nbytes for each in in_flight)
    converted = sum(each.nbytes for each in in_flight if each.converts)
    few = len(in_flight) < transfer.most_in_flight
    return few and begun < transfer.most_bytes and converted < CONVERTED_BYTES


def _groups(wanted: Iterable[ReadRequest]) -> Iterator[list[ReadRequest]]:
    """Group consecutive small tensors of one file; skip tensors without elements."""
    held = (request for request in wanted if request[1].numel())
    for (_, small), requests in groupby(held, lambda each: (each[0].file, each[0].is_small)):
        if small:
            yield list(requests)
        else:
            yield from ([request] for request in requests)


def _read_small(file: int, requests: list[ReadRequest]) -> None:
    """Read tensors of one file in this thread, copy them together, and split them on the device."""
    # By both dtypes: on CUDA `_foreach_copy_` assumes that all targets have the first one's dtype.
    kinds: dict[tuple[torch.dtype, torch.dtype], list[ReadRequest]] = defaultdict(list)
    for stored, target in requests:
        kinds[stored.dtype, target.dtype].append((stored, target))
    held: list[tuple[Tensor, list[Tensor]]] = []
    places: list[tuple[StoredTensor, memoryview]] = []
    for (dtype, _), same in kinds.items():
        targets = [target.detach() for _, target in same]
        data = torch.empty(sum(map(Tensor.numel, targets)), dtype=dtype)
        held.append((data, targets))
        view = bytes_of(data)
        for stored, _ in same:
            places.append((stored, view[: stored.nbytes]))
            view = view[stored.nbytes :]
    with _explained(requests[0][0].file, file, [stored for stored, _ in requests]):
        _fill(file, places)
    # As few torch calls as possible: each releases the interpreter lock.
    for data, targets in held:
        sources = _unflatten_dense_tensors(data.to(targets[0].device), targets)  # type: ignore[no-untyped-call]
        torch._foreach_copy_(targets, list(sources), non_blocking=True)


def _fill(file: int, places: list[tuple[StoredTensor, memoryview]]) -> None:
    """Read tensors of a file into their views, those that are close together at once."""
    places = sorted(places, key=lambda each: each[0].start)
    while places:
        count = 1
        while (
            count < len(places) and places[count][0].start - places[count - 1][0].end <= GAP_BYTES
        ):
            count += 1
        near, places = places[:count], places[count:]
        start = near[0][0].start
        data = memoryview(bytearray(near[-1][0].end - start))
        read_bytes(file, start, data)
        for stored, view in near:
            view[:] = data[stored.start - start : stored.end - start]


@contextmanager
def _explained(path: Path, file: int = -1, wanted: Iterable[StoredTensor] = ()) -> Iterator[None]:
    """Convert errors of opening or reading a file to WeightsError, naming a missing tensor."""
    try:
        yield
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror or error}") from error
    except EOFError as error:
        size = os.fstat(file).st_size  # and not where this read ended: it may lie far behind
        lacking = [stored for stored in wanted if stored.end > size]
        if not lacking:
            raise WeightsError(f"{path} cannot be read: it was being written") from error
        first = min(lacking, key=lambda each: each.start)
        place = "within" if first.start < size else "before"
        raise WeightsError(
            f"{path} ends after {size:,} bytes, {place} tensor {first.name!r}: the file was cut; "
            "copy or convert it again"
        ) from error


class BackgroundReader:
    """Reads in a background thread: `read` returns at once, `wait` when all tensors have arrived.

    It is a context manager. At a normal end it waits for all tensors. After an error in the block
    it waits only for the transfers under way.
    """

    def __init__(self, reader: TensorReader) -> None:
        self._reader = reader
        self._pool = ThreadPoolExecutor(1, "weights")
        self._tasks: list[Future[None]] = []
        self._changed = Condition()
        self._coming: set[int] = set()  # by id: their tensors live until they have arrived
        self._ending = Event()

    @property
    def device(self) -> torch.device:
        return self._reader.device

    def read(self, wanted: Iterable[ReadRequest], reader: TensorReader | None = None) -> None:
        """Enqueue all of `wanted`, to be filled after the requests of earlier calls.

        Args:
            reader: a reader to use instead of its own, for tensors on another device.
        """
        taken = deque(wanted)
        with self._changed:
            self._coming.update(id(target) for _, target in taken if target.numel())
        task = partial((reader or self._reader).read, self._each_once(taken), self._note_arrival)
        self._tasks.append(self._pool.submit(self._unless_ending, task))

    def wait(self) -> None:
        """Wait until everything is read. Raises the first error; nothing is read after it."""
        while self._tasks:
            self._tasks.pop(0).result()

    def wait_for(self, tensors: Iterable[Tensor]) -> None:
        """Wait for those `tensors` that are being read; device work enqueued later sees them."""
        wanted = {id(tensor) for tensor in tensors}
        with self._changed:
            self._changed.wait_for(lambda: self._ending.is_set() or wanted.isdisjoint(self._coming))
        if self._ending.is_set():
            self.wait()
            raise WeightsError("no more weights are read, because of an error elsewhere")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            self._end()
        self._pool.shutdown(cancel_futures=error is not None)
        if error is None:
            self.wait()

    def _unless_ending(self, task: Callable[[], None]) -> None:
        if self._ending.is_set():
            return
        try:
            task()
        except BaseException:
            self._end()
            raise

    def _end(self) -> None:
        with self._changed:
            self._ending.set()
            self._changed.notify_all()

    def _note_arrival(self, tensors: list[Tensor]) -> None:
        with self._changed:
            self._coming.difference_update(id(tensor) for tensor in tensors)
            self._changed.notify_all()

    def _each_once(self, taken: deque[ReadRequest]) -> Iterator[ReadRequest]:
        """Yield the requests and drop them, so that their memory can be freed before the last."""
        while taken and not self._ending.is_set():
            yield taken.popleft()


Reader = TensorReader | BackgroundReader
"""Fills tensors of one device from files. Errors are raised by `TensorReader.read`; a
`BackgroundReader` raises them in `wait`, in `wait_for` and at the end of its context."""
