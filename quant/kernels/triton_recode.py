"""Convert HiFloat8 codes to E4M3 codes on a GPU; codes are read twice and written once.

There are 256 codes, so both kernels look codes up in tables. The first table gives the rank of a
code's magnitude among all magnitudes, to find the largest one. The second gives the E4M3 code that
is nearest to the code's value times a factor.
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
_CODES = 8192  # per Triton program
_WARPS = 8


@triton.jit
def _largest_rank(codes_ptr, ranks_ptr, largest_ptr, count, N: tl.constexpr):
    position = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    code = tl.load(codes_ptr + position, mask=position < count, other=0).to(tl.int32)
    tl.atomic_max(largest_ptr, tl.max(tl.load(ranks_ptr + code).to(tl.int32), axis=0))


@triton.jit
def _translate(codes_ptr, table_ptr, out_ptr, inexact_ptr, count, N: tl.constexpr):
    position = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    mask = position < count
    code = tl.load(codes_ptr + position, mask=mask, other=0).to(tl.int32)
    tl.store(out_ptr + position, tl.load(table_ptr + code), mask=mask)
    inexact = tl.load(table_ptr + 256 + code, mask=mask, other=0).to(tl.int32)
    tl.atomic_add(inexact_ptr, tl.sum(inexact, axis=0))


def largest_ranks(parts: Sequence[Tensor]) -> Tensor:
    """Find the rank of the largest |value| of each part, for `magnitude`: [parts] int32.

    The call does not wait for the device. NaN and infinity count as 0.

    Args:
        parts: [...] uint8 HiFloat8 codes, on one device.
    """
    device = parts[0].device
    ranks = _ranks(device)
    # Four integers per part, because Triton compiles again for pointers not aligned to 16 bytes.
    found = torch.zeros(len(parts), 4, dtype=torch.int32, device=device)
    for index, part in enumerate(parts):
        flat = part.reshape(-1)
        grid = (triton.cdiv(flat.numel(), _CODES),)
        _largest_rank[grid](flat, ranks, found[index], flat.numel(), N=_CODES, num_warps=_WARPS)
    return found[:, 0]


def magnitude(rank: int) -> float:
    """Return the |value| of a rank."""
    return _magnitudes()[rank]


def to_e4m3(codes: Tensor, factor: float, out: Tensor, inexact: Tensor) -> None:
    """Write the values of `codes` times `factor` into `out`, saturated, and count inexact ones.

    Args:
        codes: [...] uint8 HiFloat8.
        out: [...] E4M3 of the same size, contiguous.
        inexact: [1] int32, to which the number of codes without an exact E4M3 value is added.
    """
    table = _table(factor, codes.device)
    flat = codes.reshape(-1)
    _translate[(triton.cdiv(flat.numel(), _CODES),)](
        flat, table, out.view(torch.uint8), inexact, flat.numel(), N=_CODES, num_warps=_WARPS
    )


@lru_cache(maxsize=1)
def _magnitudes() -> list[float]:
    """Return the magnitudes of all codes, ascending and without repetition."""
    return sorted(set(hif8.code_values().abs().nan_to_num(0.0, 0.0).tolist()))


@lru_cache(maxsize=8)
def _ranks(device: torch.device) -> Tensor:
    """Return the rank of every code's magnitude: [256] uint8."""
    values = hif8.code_values().abs().nan_to_num(0.0, 0.0).tolist()
    ranks = torch.tensor([_magnitudes().index(value) for value in values], dtype=torch.uint8)
    return ranks.to(device)


@lru_cache(maxsize=256)
def _table(factor: float, device: torch.device) -> Tensor:
    """Return for all codes the E4M3 code of value * factor, then whether it is inexact: [512]."""
    values = hif8.code_values() * factor
    codes = values.clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)
    inexact = codes.float() != values
    return torch.cat((codes.view(torch.uint8), inexact.to(torch.uint8))).to(device)
