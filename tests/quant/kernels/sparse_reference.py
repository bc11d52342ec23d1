"""Choose blocks and attend to them in NumPy and loops, to compare our kernels with."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]


def blocks_of(tokens: int, block: int) -> list[range]:
    return [range(n, min(n + block, tokens)) for n in range(0, tokens, block)]


def choose(q: Tensor, k: Tensor, block: int, share: float) -> NDArray[np.bool_]:
    """q, k [B, S, heads, D] → kept [B, heads, M, M]."""
    queries, keys = (x.double().numpy() for x in (q, k))
    batch, tokens, heads, width = queries.shape
    blocks = blocks_of(tokens, block)
    kept = np.zeros((batch, heads, len(blocks), len(blocks)), bool)
    for b, h in np.ndindex(batch, heads):
        for m, rows in enumerate(blocks):
            mean = queries[b, list(rows), h].mean(0)
            held = [
                len(each) * np.exp(mean @ keys[b, list(each), h].mean(0) / np.sqrt(width))
                for each in blocks
            ]
            total = 0.0
            for n in np.argsort(held)[::-1]:
                kept[b, h, m, n] = True
                total += held[n] / sum(held)
                if total >= share and share < 1:
                    break
    return kept


def attend(
    q: Tensor, k: Tensor, v: Tensor, kept: NDArray[np.bool_], block: int
) -> tuple[Array, Array]:
    """Return the attention to kept blocks [B, S, heads, D], and each query's mass [B, S, heads]."""
    queries, keys, values = (x.double().numpy() for x in (q, k, v))
    batch, tokens, heads, width = queries.shape
    out, mass = np.zeros_like(queries), np.zeros((batch, tokens, heads))
    blocks = blocks_of(tokens, block)
    for b, s, h in np.ndindex(batch, tokens, heads):
        weights = np.exp(keys[b, :, h] @ queries[b, s, h] / np.sqrt(width))
        seen = [
            token
            for number, each in enumerate(blocks)
            if kept[b, h, s // block, number]
            for token in each
        ]
        out[b, s, h] = weights[seen] @ values[b, seen, h] / weights[seen].sum()
        mass[b, s, h] = weights[seen].sum() / weights.sum()
    return out, mass
