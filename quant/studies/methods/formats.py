"""Define the number formats that methods round to.

Each rounds x / scale to its grid and multiplies back, in float32: nothing but the rounding is seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from quant.numerics import reference
from quant.numerics.scaling import ScalePolicy, scale_policy


class Format(Protocol):
    """A number format.

    Attributes:
        name: as in tables.
        bits: of a value, with the scales that the format itself holds.
        policy: how scales are chosen where a method says nothing else.
    """

    @property
    def name(self) -> str:
        """Its name in tables."""

    @property
    def bits(self) -> float:
        """Bits of a value, with the scales that the format itself holds."""

    @property
    def policy(self) -> ScalePolicy:
        """How scales are chosen where a method says nothing else."""

    def fake_quantize(self, x: Tensor, scale: Tensor) -> Tensor:
        """Round to the format and back: x [...], scale broadcastable → [...] float32."""


def amax_policy(largest: float, name: str) -> ScalePolicy:
    """Return the rule that maps amax to the largest value of a format."""
    return ScalePolicy(f"amax{largest:g}", largest, False, False, f"amax at {largest:g}", name)


@dataclass(frozen=True, slots=True)
class Bfloat16:
    """BF16 without scales: 8 bits of precision, what the model is stored in."""

    name: ClassVar[str] = "BF16"
    bits: ClassVar[float] = 16
    policy: ClassVar[ScalePolicy] = scale_policy("none")

    def fake_quantize(self, x: Tensor, scale: Tensor) -> Tensor:
        """Round to nearest even; the scale is not used."""
        del scale
        return x.bfloat16().float()


@dataclass(frozen=True, slots=True)
class HiFloat8:
    """HiFloat8, as `quant.numerics.hif8` defines it."""

    name: ClassVar[str] = "HiF8"
    bits: ClassVar[float] = 8
    policy: ClassVar[ScalePolicy] = scale_policy("pow2")

    def fake_quantize(self, x: Tensor, scale: Tensor) -> Tensor:
        """Round to nearest, half away from zero."""
        return reference.fake_quantize(x.float(), scale)


@dataclass(frozen=True, slots=True)
class Integer:
    """Symmetric integers from −(2**(bits − 1) − 1) up, as in `quant.numerics.int8`.

    Attributes:
        bits: 8 or 4.
    """

    bits: int

    @property
    def name(self) -> str:
        """Its name in tables."""
        return f"INT{self.bits}"

    @property
    def largest(self) -> int:
        """The largest code."""
        return int(2 ** (self.bits - 1) - 1)

    @property
    def policy(self) -> ScalePolicy:
        """Amax is mapped to the largest code."""
        return amax_policy(self.largest, self.name)

    def fake_quantize(self, x: Tensor, scale: Tensor) -> Tensor:
        """Round to nearest even; larger values saturate."""
        codes = torch.round(x.float() / scale).clamp(-self.largest, self.largest)
        return codes * scale


@dataclass(frozen=True, slots=True)
class Float8:
    """An 8-bit floating-point format of torch, saturating.

    Attributes:
        dtype: torch.float8_e4m3fn or torch.float8_e5m2.
    """

    dtype: torch.dtype

    bits: ClassVar[float] = 8

    @property
    def name(self) -> str:
        """Its name in tables."""
        return "E4M3" if self.dtype is torch.float8_e4m3fn else "E5M2"

    @property
    def policy(self) -> ScalePolicy:
        """Amax is mapped to the largest finite value, 448 or 57,344."""
        return amax_policy(torch.finfo(self.dtype).max, self.name)

    def fake_quantize(self, x: Tensor, scale: Tensor) -> Tensor:
        """Round to nearest even; larger values saturate."""
        largest = torch.finfo(self.dtype).max
        codes = (x.float() / scale).clamp(-largest, largest).to(self.dtype)
        return codes.float() * scale


@dataclass(frozen=True, slots=True)
class HiFloat4:
    """HiFloat4 as we read it from public code; no specification was at hand, so "HiF4-like".

    64 neighbours along the last dimension share 32 bits of scales, which makes 4.5 bits a value:
    one scale with 6 bits of exponent and 2 of mantissa (2**-48 to 1.5 * 2**15), amax / 7 rounded;
    a factor of 1 or 2 for every eight values, 2 if one of them reaches 4; and a factor of 1 or 2
    for every four, 2 if one of them still reaches 2. A value is a sign and 0 to 1.75 in steps of
    0.25. So the largest is 1.75 * 2 * 2 = 7 scales. A last group of fewer is filled with zeros.
    """

    name: ClassVar[str] = "HiF4-like"
    bits: ClassVar[float] = 4.5
    policy: ClassVar[ScalePolicy] = scale_policy("none")
    group: ClassVar[int] = 64

    def fake_quantize(self, x: Tensor, scale: Tensor) -> Tensor:
        """Round values to nearest, half away from zero, under the format's own scales."""
        width = x.shape[-1]
        scaled = torch.nn.functional.pad(x.float() / scale, (0, -width % self.group))
        groups = scaled.reshape(*x.shape[:-1], -1, 8, 2, 4)
        magnitude = groups.abs()
        by_four = magnitude.amax(-1, keepdim=True)
        by_eight = by_four.amax(-2, keepdim=True)
        shared = _e6m2(by_eight.amax(-3, keepdim=True) / 7)
        eights = 1.0 + (by_eight >= 4 * shared)
        fours = 1.0 + (by_four >= 2 * shared * eights)
        step = shared * eights * fours / 4
        codes = torch.floor(magnitude / step + 0.5).clamp(max=7)
        rounded: Tensor = (codes * step).copysign(groups).flatten(-4)[..., :width]
        return rounded * scale


def _e6m2(x: Tensor) -> Tensor:
    """Round positive numbers to 2 bits of mantissa, within 2**-48 and 1.5 * 2**15."""
    mantissa, exponent = torch.frexp(x)  # in [1/2, 1)
    return torch.ldexp(torch.round(mantissa * 8), exponent - 3).clamp(2.0**-48, 1.5 * 2.0**15)


BF16 = Bfloat16()
HIF8 = HiFloat8()
INT8, INT4 = Integer(8), Integer(4)
E4M3, E5M2 = Float8(torch.float8_e4m3fn), Float8(torch.float8_e5m2)
HIF4 = HiFloat4()
