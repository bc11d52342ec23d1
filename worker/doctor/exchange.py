"""Check that the cards of one machine exchange tensors, by a process for each of them.

`python -m worker.doctor.exchange KIND` is one rank, with torchrun's variables in its environment.
It connects as ranks that run a job do, exchanges a tensor with all others, and prints the seconds.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import cast

import torch
import torch.distributed as dist

from worker.device import Device, DeviceKind, pick_device
from worker.distributed.rank_group import RankGroup, join
from worker.doctor.report import Fault, Finding

TIMEOUT_S = 180.0
_LAST_WORDS_S = 15.0
"""How long the other ranks may go on once one has failed: they may say why."""
_BYTES = 16 << 20

_REMEDIES = {
    "cpu": "see that GLOO_SOCKET_IFNAME names an interface of this machine (lo)",
    "cuda": "see NCCL_DEBUG=INFO for the cause; NCCL_P2P_DISABLE=1 shows whether it is the link",
    "npu": "see ~/ascend/log; no other process may hold a card, HCCL_IF_BASE_PORT must be free, "
    "and 'hccn_tool -i 0 -link -g' must say UP for each card",
}


def between_cards(found: Device | None, count: int) -> Callable[[], Finding | None]:
    """Build the check of all `count` devices; nothing to check with one."""

    def look() -> Finding | None:
        assert found is not None, "the report skips this check without a device"
        if count < 2:
            return None
        said = run_ranks(found.kind, count)
        figures: dict[str, float | str] = {
            "all_to_all_ms": round(1e3 * said["seconds"], 3),
            "mib_of_each_rank": _BYTES >> 20,
        }
        name = found.collectives.upper()
        return Finding(f"{count} devices exchange tensors by {name}", figures=figures)

    return look


def run_ranks(kind: DeviceKind, count: int) -> dict[str, float]:
    """Run a rank for each device, and return what the first one measured.

    Raises:
        Fault: a rank failed or hung; with the last lines that it wrote.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    base = {"GLOO_SOCKET_IFNAME": "lo", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"} | os.environ | common
    command = [sys.executable, "-m", "worker.doctor.exchange", kind]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as log:
        ranks = [
            subprocess.Popen(
                command,
                env=base | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=out if rank == 0 else subprocess.DEVNULL,
                stderr=log,
            )
            for rank in range(count)
        ]
        statuses = _wait(ranks)
        out.seek(0)
        log.seek(0)
        if any(statuses):
            said = " ".join(log.read()[-600:].split())
            raise Fault(f"ranks ended with {statuses}: {said}", _REMEDIES[kind])
        return cast("dict[str, float]", json.loads(out.read().splitlines()[-1]))


def _wait(ranks: list[subprocess.Popen[bytes]]) -> list[int]:
    """Wait for all ranks; once one fails or time is over, end the others."""
    deadline = time.monotonic() + TIMEOUT_S
    has_failed = False
    while any(rank.poll() is None for rank in ranks):
        if not has_failed and any(rank.poll() for rank in ranks):
            has_failed = True
            deadline = min(deadline, time.monotonic() + _LAST_WORDS_S)
        if time.monotonic() > deadline:
            for rank in ranks:
                rank.kill()
        time.sleep(0.05)
    return [rank.wait() for rank in ranks]


def exchange(ranks: RankGroup) -> float:
    """Exchange a tensor between all ranks, after the first time; return its seconds."""
    ranks.warm_up()
    where = ranks.device.torch_device
    group = dist.new_group(list(range(ranks.world)), backend=ranks.device.collectives)
    each = _BYTES // 8 // ranks.world
    sent = torch.full((ranks.world * each,), ranks.rank, dtype=torch.int64, device=where)
    received = torch.empty_like(sent)
    for _ in range(2):
        ranks.sync_or_abort()
        started = time.perf_counter()
        dist.all_to_all_single(received, sent, group=group)
        ranks.device.synchronize()
        seconds = time.perf_counter() - started
    expected = torch.arange(ranks.world).repeat_interleave(each)
    if not torch.equal(received.cpu(), expected):
        raise RuntimeError(f"rank {ranks.rank} received something else than was sent")
    return seconds


def main() -> None:
    """Run one rank."""
    device = pick_device(cast("DeviceKind", sys.argv[1]), 1, int(os.environ["LOCAL_RANK"]))
    with join(device) as ranks:
        seconds = exchange(ranks)
        if ranks.is_leader:
            print(json.dumps({"seconds": seconds}))  # noqa: T201  # what the parent reads
        else:
            ranks.receive()


if __name__ == "__main__":
    main()
