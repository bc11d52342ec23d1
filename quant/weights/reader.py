"""Read stored tensors into tensors of one device, at once or in a background thread.

No whole tensor is held on the host on its way to a device. What is stored in another dtype than
wanted is converted where it arrives. Small tensors are read together, because each one by itself
costs turns at the interpreter's lock.
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
from quant.weights.transfer import Transfer, fastest_transfer, memory_of, read_bytes

GAP_BYTES = 64 << 10
"""What is read in vain between two small tensors rather than asking twice."""
CONVERTED_BYTES = 768 << 20
"""What may lie on the device in its stored dtype, to be converted."""

ReadRequest = tuple[StoredTensor, Tensor]
"""A tensor in a file, and the contiguous tensor of the same shape that is to hold it."""


class TensorReader:
    """Reads stored tensors into tensors of one device."""

    def __init__(
        self, device: torch.device, transfer: Callable[[], Transfer] | None = None
    ) -> None:
        """transfer: makes what moves the bytes, by default the fastest there is."""
        if device.type != "cpu" and device.index is None:
            # Each thread has a current device of its own.
            index = torch.get_device_module(device).current_device()
            device = torch.device(device.type, index)
        self.device = device
        self._make_transfer = transfer or partial(fastest_transfer, device)

    def prepare(self) -> None:
        """Make what the first `read` to this device would otherwise have to wait for."""
        self._make_transfer()

    @torch.no_grad()
    def read(
        self, wanted: Iterable[ReadRequest], arrived: Callable[[list[Tensor]], object] = id
    ) -> None:
        """Fill every wanted tensor; when it returns, all have arrived.

        It goes fastest in the order of the files.

        Args:
            arrived: is called with tensors that work given to the device from then on finds filled.

        Raises:
            WeightsError: a file cannot be read or has become shorter; it names the tensor.
        """
        in_flight: deque[_Slice] = deque()
        with ExitStack() as opened:

            @cache
            def open_file(path: Path) -> int:
                with _explained(path):
                    number = os.open(path, os.O_RDONLY)
                opened.callback(os.close, number)
                return number

            def finish_first() -> None:
                arrived(in_flight[0].finish())
                in_flight.popleft()

            transfer = self._make_transfer()
            opened.callback(transfer.close)
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
    """Elements of a large tensor, at most `count` from `first` on, on their way to the target."""

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
        """Wait for it; returns the target if nothing of it is left to be read."""
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
    """Put small tensors that follow each other together; leave out tensors without elements."""
    held = (request for request in wanted if request[1].numel())
    for (_, small), requests in groupby(held, lambda each: (each[0].file, each[0].is_small)):
        if small:
            yield list(requests)
        else:
            yield from ([request] for request in requests)


def _read_small(file: int, requests: list[ReadRequest]) -> None:
    """Read tensors of one file by this thread, copy them together, and split them on the device."""
    # By both dtypes: `_foreach_copy_` takes all targets for the first one's dtype on a card.
    kinds: dict[tuple[torch.dtype, torch.dtype], list[ReadRequest]] = defaultdict(list)
    for stored, target in requests:
        kinds[stored.dtype, target.dtype].append((stored, target))
    held: list[tuple[Tensor, list[Tensor]]] = []
    places: list[tuple[StoredTensor, memoryview]] = []
    for (dtype, _), same in kinds.items():
        targets = [target.detach() for _, target in same]
        data = torch.empty(sum(map(Tensor.numel, targets)), dtype=dtype)
        held.append((data, targets))
        view = memory_of(data)
        for stored, _ in same:
            places.append((stored, view[: stored.nbytes]))
            view = view[stored.nbytes :]
    with _explained(requests[0][0].file, file, [stored for stored, _ in requests]):
        _fill(file, places)
    # As few calls of torch as can be: each gives the interpreter's lock away.
    for data, targets in held:
        sources = _unflatten_dense_tensors(data.to(targets[0].device), targets)  # type: ignore[no-untyped-call]
        torch._foreach_copy_(targets, list(sources), non_blocking=True)


def _fill(file: int, places: list[tuple[StoredTensor, memoryview]]) -> None:
    """Read tensors of a file to their places, those that lie close together at once."""
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
    """Raise what opening or reading a file meets as WeightsError, naming a tensor it lacks."""
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
    """Reads in a thread of its own: `read` returns at once, `wait` when all tensors have arrived.

    It is a context manager. Left in order, it waits as well. Left by an error, it waits only for
    what is in flight.
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
        """Take all of `wanted` now, and fill it after what was wanted before.

        Args:
            reader: another than its own, for tensors of another device.
        """
        taken = deque(wanted)
        with self._changed:
            self._coming.update(id(target) for _, target in taken if target.numel())
        task = partial((reader or self._reader).read, self._each_once(taken), self._note_arrival)
        self._tasks.append(self._pool.submit(self._unless_ending, task))

    def wait(self) -> None:
        """Wait until everything is read; after the first error nothing more is."""
        while self._tasks:
            self._tasks.pop(0).result()

    def wait_for(self, tensors: Iterable[Tensor]) -> None:
        """Wait until those of the tensors that are being read have arrived.

        Work that is given to the device from then on finds them filled.
        """
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
            self._ending.set()
        self._pool.shutdown(cancel_futures=error is not None)
        if error is None:
            self.wait()

    def _unless_ending(self, task: Callable[[], None]) -> None:
        if self._ending.is_set():
            return
        try:
            task()
        except BaseException:
            with self._changed:
                self._ending.set()
                self._changed.notify_all()
            raise

    def _note_arrival(self, tensors: list[Tensor]) -> None:
        with self._changed:
            self._coming.difference_update(id(tensor) for tensor in tensors)
            self._changed.notify_all()

    def _each_once(self, taken: deque[ReadRequest]) -> Iterator[ReadRequest]:
        """Hand them out and forget them, so that their memory can be given back before the last."""
        while taken and not self._ending.is_set():
            yield taken.popleft()


Reader = TensorReader | BackgroundReader
"""Fills tensors of one device from files. Errors come from `read` of the first kind, and from
`wait`, `wait_for` and the end of the context of the second."""
