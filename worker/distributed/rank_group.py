"""Coordinate the ranks that run one job together, one process and one device each.

torchrun starts the processes. Rank 0 is the leader: the worker with Redis, text encoder, VAE and
MP4. The other ranks are followers (`worker/distributed/follower.py`). All ranks denoise together.

A failure on one rank must not leave the others waiting for it. So before each exchange of tensors
all ranks synchronize on the host with an all-reduce, and the exchange starts only if every rank has
reached it without an error. A rank that fails, or a leader whose job is cancelled, reports an error
there instead, and the job ends on all ranks at this point. Their connections stay intact, and the
next job can run. One synchronization takes the host 0.1 to 0.4 ms, which does not delay a device
with work in its queue.

Tensors go through NCCL, HCCL or gloo by eager calls. Nothing here may be traced by torch.compile: a
traced all-to-all of equal parts becomes one of unequal parts, which HCCL runs more slowly.

Two failures need more. A process that ends takes the others with it, because their synchronization
fails. A process that hangs is ended by the leader's watchdog, since the leader waits for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist

from quant.transformer.context_parallel import Ulysses, all_gather
from worker.device import Device
from worker.distributed.layout import RankLayout
from worker.errors import RankFailed, RanksLost

NO_TIMEOUT = timedelta(days=3650)
"""Ranks wait without a limit for the next task and for each other; the watchdog has the limit."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RankError:
    """The reason why a rank aborted."""

    rank: int
    kind: Literal["out of memory", "lost", "stopped"]
    error: str


class PeerFailed(Exception):
    """Another rank has aborted the job."""


class RankGroup:
    """The ranks of one job, seen from this process."""

    def __init__(self, rank: int, world: int, device: Device) -> None:
        """Create the process groups; all ranks must do so, after `dist.init_process_group`."""
        self.rank, self.world, self.device = rank, world, device
        self.ulysses = Ulysses(self.sync_or_abort)
        self._lost = False
        self._control = dist.new_group(backend="gloo", timeout=NO_TIMEOUT)
        self._groups: dict[tuple[int, ...], Any] = {}
        for guided in (True, False):
            for ranks in RankLayout.of(world, guided).groups():
                if ranks not in self._groups:
                    group = dist.new_group(list(ranks), backend=device.collectives)
                    self._groups[ranks] = group

    @property
    def is_leader(self) -> bool:
        """Whether this is rank 0, which receives the jobs."""
        return self.rank == 0

    # ------------------------------------------------------------------ messages

    def broadcast(self, value: object) -> None:
        """Send a value to all followers, which must call `receive`.

        Raises:
            RanksLost: a follower's process has ended.
        """
        with self._detect_lost_rank():
            dist.broadcast_object_list([value], src=0, group=self._control)

    def receive(self) -> Any:
        """Wait for the leader's next `broadcast`; raises RanksLost."""
        values: list[Any] = [None]
        with self._detect_lost_rank():
            dist.broadcast_object_list(values, src=0, group=self._control)
        return values[0]

    def shutdown(self) -> None:
        """End the followers."""
        if not self._lost:
            self.broadcast(None)

    def all_gather(self, value: T) -> list[T]:
        """Collect a value from every rank, in the order of the ranks; raises RanksLost."""
        values: list[Any] = [None] * self.world
        with self._detect_lost_rank():
            dist.all_gather_object(values, value, group=self._control)
        return values

    # ------------------------------------------------------------------ synchronization

    def run_together(self, work: Callable[[], T]) -> T:
        """Run this rank's part of what all ranks do; it succeeds on all ranks or on none.

        Raises:
            torch.OutOfMemoryError, RankFailed: another rank failed or was cancelled.
            RanksLost: another rank's device is lost, or its process has ended.
            Exception: raised by `work` on this rank.
        """
        try:
            result = work()
            self.sync_or_abort()
        except RanksLost:
            raise
        except PeerFailed:
            failure = _to_exception(self._gather_errors(None))
            self._lost |= isinstance(failure, RanksLost)
            raise failure from None
        except Exception as error:
            self._all_fine(False)
            own = self._describe_error(error)
            self._gather_errors(own)
            self._lost |= own.kind == "lost"  # all ranks end now, and none waits for a shutdown
            raise
        return result

    def sync_or_abort(self) -> None:
        """Wait until all ranks call this; abort if one of them has failed.

        Raises:
            PeerFailed: another rank has failed; no tensors may be exchanged.
            RanksLost: another rank's process has ended.
        """
        if not self._all_fine(True):
            raise PeerFailed

    @contextmanager
    def use_layout(self, layout: RankLayout) -> Iterator[Any]:
        """Split tokens as in `layout`; yield the process group across the branches, or None."""
        with self.ulysses.use_group(self._group(layout.ulysses_ranks(self.rank))):
            yield self._group(layout.cfg_ranks(self.rank))

    def warm_up(self) -> None:
        """Exchange once within each group: only then do libraries connect and allocate memory."""
        for ranks, group in self._groups.items():
            if self.rank in ranks:
                # Of the dtype that jobs exchange: a library may lack it.
                token = torch.zeros(len(ranks), dtype=torch.int64, device=self.device.torch_device)
                self.sync_or_abort()
                dist.all_to_all_single(torch.empty_like(token), token, group=group)
                all_gather(token, group, self.sync_or_abort)
            else:
                self.sync_or_abort()
                self.sync_or_abort()
        self.device.synchronize()

    def _group(self, ranks: tuple[int, ...]) -> Any:
        return self._groups[ranks] if len(ranks) > 1 else None

    def _all_fine(self, fine: bool) -> bool:
        """Synchronize all ranks; return whether all of them passed True."""
        flag = torch.tensor([fine], dtype=torch.int32)
        with self._detect_lost_rank():
            dist.all_reduce(flag, dist.ReduceOp.MIN, group=self._control)
        return bool(flag.item())

    def _describe_error(self, error: Exception) -> RankError:
        kind: Literal["out of memory", "lost", "stopped"] = "stopped"
        if self.device.is_out_of_memory(error):
            kind = "out of memory"
        elif self.device.is_lost(error):
            kind = "lost"
        text = type(error).__name__
        if kind == "lost":  # the leader's log then says what happened to which card
            text = f"{text}: {' '.join(str(error).split())[:200]}"
        return RankError(self.rank, kind, text)

    def _gather_errors(self, own: RankError | None) -> list[RankError]:
        return [error for error in self.all_gather(own) if error is not None]

    @contextmanager
    def _detect_lost_rank(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            self._lost = True
            raise RanksLost(
                "Another rank's process has ended, and none goes on without it; its own lines say "
                f"why ({str(error).partition('. ')[0][-200:]})."
            ) from error


@contextmanager
def join(device: Device) -> Iterator[RankGroup]:
    """Join the other processes that torchrun has started.

    When the leader leaves the context without an error, the followers end as well.

    Raises:
        RanksLost: one of them has ended meanwhile.
    """
    try:
        dist.init_process_group("gloo")
    except RuntimeError as error:
        raise RanksLost(f"The other ranks' processes were not met: {error}.") from error
    ranks = RankGroup(dist.get_rank(), dist.get_world_size(), device)
    yield ranks
    if ranks.is_leader:
        ranks.shutdown()
    dist.destroy_process_group()


def _to_exception(errors: list[RankError]) -> Exception:
    """Choose the exception to raise on this rank for the errors of other ranks."""
    for kind in ("lost", "out of memory", "stopped"):
        for error in errors:
            if error.kind != kind:
                continue
            text = f"rank {error.rank}: {error.error}"
            if kind == "lost":
                return RanksLost(f"A rank can do nothing more: {text}.")
            if kind == "out of memory":
                return torch.OutOfMemoryError(f"A rank ran out of memory: {text}.")
            return RankFailed(f"The job ended on another rank: {text}.")
    raise AssertionError("the ranks aborted, and none reported an error")
