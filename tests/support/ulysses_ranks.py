"""Two or more cards that trade tokens for heads: `python -m tests.support.ulysses_ranks CARDS`

Every card checks what it gets against what it knows of all cards' tensors; the launcher ends with
the number of cards that found something wrong.
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

from quant.kernels.eager import EagerKernels
from quant.kernels.interface import KEYS_MULTIPLE, AttentionScales
from quant.transformer.context_parallel import Ulysses, gather

TOKENS, HEADS, WIDTH = 12, 4, 16


def random_inputs(batch: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v of all cards: [B, S, heads, D], the same in each process."""
    torch.manual_seed(0)
    return [torch.randn(batch, TOKENS, HEADS, WIDTH).to(dtype) for _ in "qkv"]


def check_attention(ulysses: Ulysses, batch: int) -> None:
    """BF16 attention over all tokens is that of one card."""
    q, k, v = random_inputs(batch, torch.bfloat16)
    inner = EagerKernels().attention
    mine, keys, values = (ulysses.part(x) for x in (q, k, v))
    out = ulysses.attention(inner)(mine, keys, values, None, mine.shape[1])
    whole = inner(q, k, v, None, TOKENS)
    assert torch.equal(out, ulysses.part(whole)), f"attention of {batch}"
    assert torch.equal(ulysses.whole(out), whole), f"the whole of {batch}"


def check_codes(ulysses: Ulysses, batch: int) -> None:
    """E4M3 codes arrive as they were sent, keys and values with room that holds zeros."""
    inputs = random_inputs(batch, torch.float8_e4m3fn)
    scales = AttentionScales(1.0, 1.0, 1.0, 1.0)
    seen: list[Tensor] = []

    def inner(
        q: Tensor, k: Tensor, v: Tensor, given: AttentionScales | None, tokens: int
    ) -> Tensor:
        assert (given, tokens) == (scales, TOKENS)
        assert q.shape == (batch, TOKENS, HEADS // ulysses.cards, WIDTH)
        seen.extend((k, v))
        return (v[:, :TOKENS].float() + 1).to(v.dtype).flatten(2)

    q, *ours = (ulysses.part(x) for x in inputs)
    k, v = (torch.cat([x, torch.ones_like(x)], dim=1) for x in ours)  # with room of their own
    out = ulysses.attention(inner)(q, k, v, scales, q.shape[1])
    wanted = ulysses.part((inputs[2].float() + 1).to(out.dtype).flatten(2))
    assert torch.equal(out.view(torch.uint8), wanted.view(torch.uint8))
    rank = dist.get_rank()
    heads = slice(rank * HEADS // ulysses.cards, (rank + 1) * HEADS // ulysses.cards)
    for got, sent in zip(seen, inputs[1:], strict=True):
        assert torch.equal(got[:, :TOKENS].float(), sent[:, :, heads].float())
        assert got.shape[1] == (KEYS_MULTIPLE if batch == 1 else TOKENS)
        assert not got[:, TOKENS:].float().any()


def check_votes(group: dist.ProcessGroup) -> None:
    """Whoever is told not to exchange has exchanged nothing."""

    def refuse() -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        gather(torch.ones(3), group, refuse)
    ulysses = Ulysses(refuse)
    with ulysses.over(group), pytest.raises(InterruptedError):
        check_attention(ulysses, 1)


def run_card(rank: int, cards: int) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(cards)}
    dist.init_process_group("gloo")
    votes = []
    ulysses = Ulysses(lambda: votes.append(1))
    with ulysses.over(dist.group.WORLD):
        for batch in (1, 2):
            check_attention(ulysses, batch)
            check_codes(ulysses, batch)
        assert len(votes) == 2 * (2 + 1 + 2), "one before each exchange"
        uneven = torch.zeros(1, TOKENS + 1, HEADS, WIDTH)
        with pytest.raises(ValueError, match="13 tokens cannot be shared"):
            ulysses.part(uneven)
    assert ulysses.part(uneven).shape == uneven.shape, "alone again"
    assert dist.group.WORLD is not None
    check_votes(dist.group.WORLD)
    every = gather(torch.full((2, 3), float(rank)), dist.group.WORLD, lambda: None)
    assert every.shape == (cards, 2, 3)
    assert [int(part.unique().item()) for part in every] == list(range(cards))
    dist.destroy_process_group()


def main() -> None:
    torch.set_num_threads(1)
    cards, pids = int(sys.argv[1]), []
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for rank in range(cards):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                run_card(rank, cards)
                status = 0
            except BaseException:  # noqa: BLE001  # no fork may go on as its parent
                traceback.print_exc()
            os._exit(status)
        pids.append(pid)
    sys.exit(sum(os.waitpid(pid, 0)[1] != 0 for pid in pids))


if __name__ == "__main__":
    main()
