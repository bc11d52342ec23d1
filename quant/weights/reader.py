"""Copies tensors from files to where they are wanted, as fast as the way there allows.

No whole tensor is ever held on the host on its way to a device. What is stored in another dtype
than wanted is converted where it arrives. `quant.weights.transfer` has the ways.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import islice
from queue import SimpleQueue
from threading import Condition, Event
from types import TracebackType
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from quant.errors import WeightsError
from quant.weights.fastsafetensors_reader import file_reader
from quant.weights.read_plan import ReadRange, ReadRequest, cut_into_runs
from quant.weights.transfer import FastSafetensorsTransfer, HostTransfer, PinnedTransfer, Transfer

SWITCH_INTERVAL_S = 5e-5
BATCH = 64
"""Tensors that are handed to the reading thread at once: each time it wakes it takes the lock."""


class Reader(Protocol):
    """Fills tensors of one device from files: at once (`TensorReader`) or soon
    (`BackgroundReader`).

    What `read` can raise (`WeightsError`: a file cannot be read, or has become shorter) comes from
    it in the first case. In the second it comes from whatever waits: `BackgroundReader.wait` and
    `wait_for`, and the end of its context.
    """

    @property
    def device(self) -> torch.device: ...

    def read(self, wanted: Iterable[ReadRequest]) -> None: ...


class TensorReader:
    """Reads stored tensors into tensors of one device."""

    def __init__(self, device: torch.device, way: Callable[[], Transfer] | None = None) -> None:
        """Prepare to copy; buffers are made when something is copied.

        Args:
            way: makes the way to take, by default the best there is to the device.
        """
        if device.type != "cpu" and device.index is None:
            # Which card is the current one is known to each thread for itself.
            index = torch.get_device_module(device).current_device()
            device = torch.device(device.type, index)
        self.device = device
        self._way = way or partial(best_way, device)

    def prepare(self) -> None:
        """Make what the first `read` to this device would otherwise have to wait for."""
        file_reader(self.device)

    def read(
        self, wanted: Iterable[ReadRequest], arrived: Callable[[list[Tensor]], None] | None = None
    ) -> None:
        """Fill every wanted tensor; when it returns, all have arrived.

        `wanted` is taken little by little, so that tensors may be allocated meanwhile. In the order
        of the files it goes fastest.

        Args:
            arrived: is told of tensors that work given to the device from then on will find filled.

        Raises:
            WeightsError: a file cannot be read or has become shorter; it names the tensor.
        """
        under_way: deque[ReadRange] = deque()
        begun: deque[Any] = deque()

        def end_first() -> None:
            way.end(under_way[0], begun.popleft())
            run = under_way.popleft()
            if arrived is not None:
                arrived(run.completes)

        with self._way() as way:
            for run in cut_into_runs(wanted, way.cut):
                while under_way and not way.has_room(under_way):
                    end_first()
                begun.append(way.begin(run))
                under_way.append(run)
            while under_way:
                end_first()


def best_way(device: torch.device) -> Transfer:
    """The fastest way to a device that this process has."""
    if device.type == "cpu":
        return HostTransfer()
    reader = file_reader(device)
    return PinnedTransfer(device) if reader is None else FastSafetensorsTransfer(device, reader)


class BackgroundReader:
    """A copier in a thread of its own: `read` returns at once, and `wait` when all has arrived.

    A context: left in order it waits, too; left by an error, for no more than what is under way.
    Within it the process' threads change places more often than else, or this one would have to
    wait milliseconds for each tensor while the thread that made it is busy with Python.
    """

    def __init__(self, copier: TensorReader) -> None:
        self._copier = copier
        self._pool = ThreadPoolExecutor(1, "weights")
        self._begun: list[Future[None]] = []
        self._changed = Condition()
        self._coming: set[int] = set()  # by id: their tensors live until they have arrived
        self._failed = False
        self._given_up = Event()

    @property
    def device(self) -> torch.device:
        return self._copier.device

    def read(self, wanted: Iterable[ReadRequest], copier: TensorReader | None = None) -> None:
        """Take what is wanted, all of it now, and fill it after what was wanted before.

        The first is read while the last is still being taken, which is when memory is made for it.

        Args:
            copier: another than its own, for tensors of another device.
        """
        taken: SimpleQueue[deque[ReadRequest] | None] = SimpleQueue()
        read = (copier or self._copier).read
        task = partial(read, self._each_once(taken), self._note_arrival)
        self._begun.append(self._pool.submit(self._unless_failed, task))
        try:
            rest = iter(wanted)
            while batch := deque(islice(rest, BATCH)):
                with self._changed:
                    self._coming.update(id(target) for _, target in batch if target.numel())
                taken.put(batch)
        except BaseException:
            self._given_up.set()
            raise
        finally:
            taken.put(None)

    def wait(self) -> None:
        """Wait for all that is to be done; after the first error nothing more is.

        Raises:
            WeightsError: as `TensorReader.read`.
        """
        while self._begun:
            self._begun.pop(0).result()

    def wait_for(self, tensors: Iterable[Tensor]) -> None:
        """Wait until those of the tensors that are being read have arrived.

        Work that is given to the device from then on will find them filled.

        Raises:
            WeightsError: as `TensorReader.read`.
        """
        wanted = {id(tensor) for tensor in tensors}
        with self._changed:
            self._changed.wait_for(lambda: self._failed or wanted.isdisjoint(self._coming))
        if self._failed:
            self.wait()

    def __enter__(self) -> Self:
        self._switch_interval = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None:
            self._given_up.set()
        try:
            self._pool.shutdown(cancel_futures=error is not None)
            if error is None:
                self.wait()
        finally:
            sys.setswitchinterval(self._switch_interval)

    def _unless_failed(self, task: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            task()
        except BaseException:
            with self._changed:
                self._failed = True
                self._changed.notify_all()
            raise

    def _note_arrival(self, tensors: list[Tensor]) -> None:
        with self._changed:
            self._coming.difference_update(id(tensor) for tensor in tensors)
            self._changed.notify_all()

    def _each_once(self, taken: SimpleQueue[deque[ReadRequest] | None]) -> Iterator[ReadRequest]:
        """Hand them out and forget them, so that their memory can be given back before the last."""
        while (batch := taken.get()) is not None:
            while batch:
                self._check()
                yield batch.popleft()
        self._check()

    def _check(self) -> None:
        if self._given_up.is_set():
            raise WeightsError("no more weights are read, because of an error elsewhere")
