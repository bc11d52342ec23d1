"""Several cards on one job, one process each: who does what, and how they stay in step.

torchrun starts the processes. The one of rank 0 leads: it is the worker, with Redis, text encoder,
VAE and MP4. The others follow (`worker/distributed/follower.py`). All of them denoise, in step.

What may fail on one card must not leave the others waiting for it. So before each exchange all
cards vote, on the host: an exchange begins only when every card got there. A card that fails, or a
leader that is told to stop, votes against, and the job ends on all of them at that vote; their
connections stay sound and the next job can come. A vote takes the host 0.1 to 0.4 ms, which a
device that has work in its queue does not notice.

What is beyond this: a process that ends takes the others with it, because their votes fail then;
one that hangs is the leader's watchdog's business, which waits for its vote.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist

from quant.transformer.context_parallel import Ulysses, gather
from worker.device import Device
from worker.distributed.layout import RankLayout
from worker.errors import RankFailed, RanksLost

FOR_EVER = timedelta(days=3650)
"""How long a card waits for the next order, and for a vote: the watchdog knows when to give up."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RankError:
    """Why a card voted against."""

    card: int
    kind: Literal["out of memory", "lost", "stopped"]
    error: str


class PeerFailed(Exception):
    """Another card voted against."""


class RankGroup:
    """This process among those of one job."""

    def __init__(self, rank: int, world: int, device: Device) -> None:
        """To be made by all of them at once, after `dist.init_process_group`."""
        self.rank, self.world, self.device = rank, world, device
        self.ulysses = Ulysses(self.vote)
        self._lost = False
        self._control = dist.new_group(backend="gloo", timeout=FOR_EVER)
        self._groups: dict[tuple[int, ...], Any] = {}
        for guided in (True, False):
            for ranks in RankLayout.of(world, guided).groups():
                if ranks not in self._groups:
                    group = dist.new_group(list(ranks), backend=device.collectives)
                    self._groups[ranks] = group

    @property
    def leads(self) -> bool:
        return self.rank == 0

    # ------------------------------------------------------------------ orders

    def tell(self, value: object) -> None:
        """Give every follower a value; it has to wait for one with `hear`.

        Raises:
            RanksLost: a follower's process has ended.
        """
        with self._heard():
            dist.broadcast_object_list([value], src=0, group=self._control)

    def hear(self) -> Any:
        """Wait for the leader's next value; raises RanksLost."""
        values: list[Any] = [None]
        with self._heard():
            dist.broadcast_object_list(values, src=0, group=self._control)
        return values[0]

    def dismiss(self) -> None:
        """Have the followers end."""
        if not self._lost:
            self.tell(None)

    def ask_all(self, value: T) -> list[T]:
        """What every card says, in the order of their ranks; raises RanksLost."""
        every: list[Any] = [None] * self.world
        with self._heard():
            dist.all_gather_object(every, value, group=self._control)
        return every

    # ------------------------------------------------------------------ in step

    def in_step(self, work: Callable[[], T]) -> T:
        """Run this card's part of what all cards do at once; it ends well on all, or on none.

        Raises:
            torch.OutOfMemoryError, RankFailed: another card failed, or was told to stop.
            RanksLost: another card can do nothing more, or its process has ended.
            Exception: what `work` raised here.
        """
        try:
            result = work()
            self.vote()
        except RanksLost:
            raise
        except PeerFailed:
            raise _error(self._reports(None)) from None
        except Exception as error:
            self._tally(False)
            self._reports(self._report(error))
            raise
        return result

    def vote(self) -> None:
        """Wait until all cards are here.

        Raises:
            PeerFailed: one of them will not come; nothing is to be exchanged.
            RanksLost: the process of one has ended.
        """
        if not self._tally(True):
            raise PeerFailed

    @contextmanager
    def laid_out(self, layout: RankLayout) -> Iterator[Any]:
        """Share tokens out as `layout` says; gives the group that shares the branches, or None."""
        with self.ulysses.over(self._group(layout.ulysses_ranks(self.rank))):
            yield self._group(layout.cfg_ranks(self.rank))

    def warm_up(self) -> None:
        """Exchange once within each group: libraries connect, and take their memory, only then."""
        for ranks, group in self._groups.items():
            if self.rank in ranks:
                token = torch.zeros(len(ranks), device=self.device.torch_device)
                self.vote()
                dist.all_to_all_single(torch.empty_like(token), token, group=group)
                gather(token, group, self.vote)
            else:
                self.vote()
                self.vote()
        self.device.synchronize()

    def _group(self, ranks: tuple[int, ...]) -> Any:
        return self._groups[ranks] if len(ranks) > 1 else None

    def _tally(self, fine: bool) -> bool:
        votes = torch.tensor([fine], dtype=torch.int32)
        with self._heard():
            dist.all_reduce(votes, dist.ReduceOp.MIN, group=self._control)
        return bool(votes.item())

    def _report(self, error: Exception) -> RankError:
        kind: Literal["out of memory", "lost", "stopped"] = "stopped"
        if self.device.is_out_of_memory(error):
            kind = "out of memory"
        elif self.device.is_lost(error):
            kind = "lost"
        return RankError(self.rank, kind, type(error).__name__)

    def _reports(self, own: RankError | None) -> list[RankError]:
        return [report for report in self.ask_all(own) if report is not None]

    @contextmanager
    def _heard(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            self._lost = True
            raise RanksLost(
                "Another card's process has ended, and none goes on without it; its own lines say "
                f"why ({str(error).partition('. ')[0][-200:]})."
            ) from error


@contextmanager
def meet(device: Device) -> Iterator[RankGroup]:
    """Wait for the other processes that torchrun has started, and be one of them.

    The leader's end of the context, unless it is an error, is the followers' end, too.

    Raises:
        RanksLost: one of them has ended meanwhile.
    """
    try:
        dist.init_process_group("gloo")
    except RuntimeError as error:
        raise RanksLost(f"The other cards' processes were not met: {error}.") from error
    cards = RankGroup(dist.get_rank(), dist.get_world_size(), device)
    yield cards
    if cards.leads:
        cards.dismiss()
    dist.destroy_process_group()


def _error(reports: list[RankError]) -> Exception:
    """What the reports of other cards mean for this one."""
    for kind in ("lost", "out of memory", "stopped"):
        for report in reports:
            if report.kind != kind:
                continue
            text = f"card {report.card}: {report.error}"
            if kind == "lost":
                return RanksLost(f"A card can do nothing more: {text}.")
            if kind == "out of memory":
                return torch.OutOfMemoryError(f"A card ran out of memory: {text}.")
            return RankFailed(f"The job ended on another card: {text}.")
    raise AssertionError("a vote was against, and no card says why")
