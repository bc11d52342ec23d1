"""HiFloat8 codes into E4M3 codes on a card: read twice, written once.

A code has 256 values, so both kernels are tables: which magnitude a code has among all, to find the
largest there is, and which E4M3 code is nearest to its value times a factor.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from quant.kernels.triton_fused import E4M3
from quant.numerics import hif8

E4M3_MAX = 448.0
_CODES = 8192  # of a program
_WARPS = 8


@triton.jit
def _largest_rank(codes_ptr, ranks_ptr, largest_ptr, count, N: tl.constexpr):
    where = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    code = tl.load(codes_ptr + where, mask=where < count, other=0).to(tl.int32)
    tl.atomic_max(largest_ptr, tl.max(tl.load(ranks_ptr + code).to(tl.int32), axis=0))


@triton.jit
def _translate(codes_ptr, table_ptr, out_ptr, wrong_ptr, count, N: tl.constexpr):
    where = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    mask = where < count
    code = tl.load(codes_ptr + where, mask=mask, other=0).to(tl.int32)
    tl.store(out_ptr + where, tl.load(table_ptr + code), mask=mask)
    wrong = tl.load(table_ptr + 256 + code, mask=mask, other=0).to(tl.int32)
    tl.atomic_add(wrong_ptr, tl.sum(wrong, axis=0))


def largest_ranks(parts: Sequence[Tensor]) -> Tensor:
    """Of each part the rank of its largest |value|, for `magnitude`: [parts] int32, not waited for.

    NaN and infinity count as nothing.

    Args:
        parts: [...] uint8 HiFloat8 codes, on one device.
    """
    device = parts[0].device
    ranks = _ranks(device)
    # Four for each, because Triton compiles anew for what is not aligned to 16 bytes.
    found = torch.zeros(len(parts), 4, dtype=torch.int32, device=device)
    for index, part in enumerate(parts):
        flat = part.reshape(-1)
        grid = (triton.cdiv(flat.numel(), _CODES),)
        _largest_rank[grid](flat, ranks, found[index], flat.numel(), N=_CODES, num_warps=_WARPS)
    return found[:, 0]


def magnitude(rank: int) -> float:
    """The |value| that has a rank."""
    return _magnitudes()[rank]


def to_e4m3(codes: Tensor, factor: float, out: Tensor, wrong: Tensor) -> None:
    """Write the values of `codes` times `factor` into `out`, saturated, and count.

    Args:
        codes: [...] uint8 HiFloat8.
        out: [...] E4M3 of the same size, contiguous.
        wrong: [1] int32, to which the number of codes is added that E4M3 holds no exact value of.
    """
    table = _table(factor, codes.device)
    flat = codes.reshape(-1)
    _translate[(triton.cdiv(flat.numel(), _CODES),)](
        flat, table, out.view(torch.uint8), wrong, flat.numel(), N=_CODES, num_warps=_WARPS
    )


@lru_cache(maxsize=1)
def _magnitudes() -> list[float]:
    """All that codes have, in their order."""
    return sorted(set(hif8.code_values().abs().nan_to_num(0.0, 0.0).tolist()))


@lru_cache(maxsize=8)
def _ranks(device: torch.device) -> Tensor:
    """Of every code, where its magnitude stands among all: [256] uint8."""
    values = hif8.code_values().abs().nan_to_num(0.0, 0.0).tolist()
    ranks = torch.tensor([_magnitudes().index(value) for value in values], dtype=torch.uint8)
    return ranks.to(device)


@lru_cache(maxsize=256)
def _table(factor: float, device: torch.device) -> Tensor:
    """Of every code, the E4M3 code of its value times a factor; then, whether that is inexact."""
    values = hif8.code_values() * factor
    codes = values.clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)
    inexact = codes.float() != values
    return torch.cat((codes.view(torch.uint8), inexact.to(torch.uint8))).to(device)
