"""Check the exchanges of Ulysses over gloo: `python -m tests.support.ulysses_ranks RANKS`

Each of two or more ranks compares what it receives with the tensors of all ranks, which it knows.
The exit status is the number of ranks that found a difference.
"""

from __future__ import annotations

import os
import socket
import sys
import traceback

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from quant.kernels.ascend import AscendKernels
from quant.kernels.eager import EagerKernels
from quant.kernels.interface import AttentionScales
from quant.transformer.context_parallel import Ulysses, all_gather
from tests.quant.kernels import npu_operations

TOKENS, HEADS, WIDTH = 12, 4, 16


def random_inputs(batch: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v of all ranks: [B, S, heads, D], the same in each process."""
    torch.manual_seed(0)
    return [torch.randn(batch, TOKENS, HEADS, WIDTH).to(dtype) for _ in "qkv"]


def check_attention(ulysses: Ulysses, batch: int) -> None:
    """BF16 attention over all tokens equals that of one rank alone."""
    q, k, v = random_inputs(batch, torch.bfloat16)
    inner = EagerKernels().attention
    local_q, local_k, local_v = (ulysses.local_tokens(x) for x in (q, k, v))
    out = ulysses.attention(inner)(local_q, local_k, local_v, None, None)
    expected = inner(q, k, v, None, None)
    assert torch.equal(out, ulysses.local_tokens(expected)), f"attention of batch {batch}"
    assert torch.equal(ulysses.all_tokens(out), expected), f"all tokens of batch {batch}"


def check_ascend(ulysses: Ulysses, batch: int) -> None:
    """Kernels for Ascend attend to a rank's heads as to all of them, and round the result."""
    q, k, v = random_inputs(batch, torch.bfloat16)
    local_q, local_k, local_v = (ulysses.local_tokens(x) for x in (q, k, v))
    with pytest.MonkeyPatch.context() as patch:
        npu_operations.install(patch)
        out = ulysses.attention(AscendKernels().attention)(local_q, local_k, local_v, None, 0.5)
    expected = EagerKernels().attention(q, k, v, None, 0.5)
    assert torch.equal(out, ulysses.local_tokens(expected)), f"Ascend, batch {batch}"


def check_codes(ulysses: Ulysses, batch: int) -> None:
    """E4M3 codes arrive as they were sent, and so do those of the output."""
    inputs = random_inputs(batch, torch.float8_e4m3fn)
    scales = AttentionScales(1.0, 1.0, 1.0)
    received: list[Tensor] = []

    def inner(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        given: AttentionScales | None,
        act_scale: float | None,
    ) -> Tensor:
        assert (given, act_scale) == (scales, 0.5)
        received.extend((q, k, v))
        return (v.float() + 1).to(v.dtype).flatten(2)

    q, k, v = (ulysses.local_tokens(x) for x in inputs)
    out = ulysses.attention(inner)(q, k, v, scales, 0.5)
    expected = ulysses.local_tokens((inputs[2].float() + 1).to(out.dtype).flatten(2))
    assert torch.equal(out.view(torch.uint8), expected.view(torch.uint8))
    rank = dist.get_rank()
    heads = slice(rank * HEADS // ulysses.world_size, (rank + 1) * HEADS // ulysses.world_size)
    for got, sent in zip(received, inputs, strict=True):
        assert got.shape == (batch, TOKENS, HEADS // ulysses.world_size, WIDTH)
        assert torch.equal(got.float(), sent[:, :, heads].float())


def check_abort(group: dist.ProcessGroup) -> None:
    """Where `sync_or_abort` raises, nothing is exchanged."""

    def abort() -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        all_gather(torch.ones(3), group, abort)
    ulysses = Ulysses(abort)
    with ulysses.use_group(group), pytest.raises(InterruptedError):
        check_attention(ulysses, 1)


def run_rank(rank: int, world_size: int) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size)}
    dist.init_process_group("gloo")
    syncs = []
    ulysses = Ulysses(lambda: syncs.append(1))
    with ulysses.use_group(dist.group.WORLD):
        for batch in (1, 2):
            check_attention(ulysses, batch)
            check_ascend(ulysses, batch)
            check_codes(ulysses, batch)
        assert len(syncs) == 2 * (2 + 1 + 2 + 2), "one before each exchange"
        uneven = torch.zeros(1, TOKENS + 1, HEADS, WIDTH)
        with pytest.raises(ValueError, match="13 tokens cannot be split"):
            ulysses.local_tokens(uneven)
    assert ulysses.local_tokens(uneven).shape == uneven.shape, "no group is set any more"
    assert dist.group.WORLD is not None
    check_abort(dist.group.WORLD)
    gathered = all_gather(torch.full((2, 3), float(rank)), dist.group.WORLD, lambda: None)
    assert gathered.shape == (world_size, 2, 3)
    assert [int(part.unique().item()) for part in gathered] == list(range(world_size))
    dist.destroy_process_group()


def main() -> None:
    torch.set_num_threads(1)
    world_size, pids = int(sys.argv[1]), []
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for rank in range(world_size):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                run_rank(rank, world_size)
                status = 0
            except BaseException:  # noqa: BLE001  # a forked child must not continue as its parent
                traceback.print_exc()
            os._exit(status)
        pids.append(pid)
    sys.exit(sum(os.waitpid(pid, 0)[1] != 0 for pid in pids))


if __name__ == "__main__":
    main()
