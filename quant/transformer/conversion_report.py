"""Report what a conversion did: counts, bytes, and a table to print."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from statistics import median

from torch import nn

from quant.tables import align, span


@dataclass(frozen=True, slots=True)
class ConvertedLinear:
    """One linear that was converted.

    Attributes:
        kind: its name inside the block, such as `attn1.to_q`.
        weight_scale: its scale; the largest one when there is one per channel.
        act_scale: the static scale of its input; None when each token gets its own.
        weight_sqnr_db: SQNR of the rounded weights against the original ones.
    """

    block: int
    kind: str
    out_features: int
    in_features: int
    weight_scale: float
    act_scale: float | None
    weight_sqnr_db: float


@dataclass(frozen=True, slots=True)
class ConversionReport:
    """The result of `quantize_transformer`: what was converted.

    Attributes:
        weight_bytes: bytes of all tensors that the quantized tree uses, shared ones included.
        source_weight_bytes: the same for the source tree.
    """

    rows: tuple[ConvertedLinear, ...]
    blocks: int
    total_blocks: int
    weight_bytes: int
    source_weight_bytes: int

    @property
    def linears(self) -> int:
        """The number of linears that were converted."""
        return len(self.rows)

    def __str__(self) -> str:
        return (
            f"{self.linears} linears in {self.blocks} of {self.total_blocks} blocks quantized, "
            f"{self.weight_bytes:,} bytes of weights instead of {self.source_weight_bytes:,}"
        )

    def table(self) -> str:
        """Return a table with count, shape, scales and weight SQNR of each kind of linear."""
        lines: list[tuple[str, ...]] = [
            ("linear", "blocks", "shape", "weight scale", "act scale", "weight SQNR (min / median)")
        ]
        for kind in dict.fromkeys(row.kind for row in self.rows):
            rows = [row for row in self.rows if row.kind == kind]
            sqnr = [row.weight_sqnr_db for row in rows]
            lines.append(
                (
                    kind,
                    str(len(rows)),
                    f"{rows[0].out_features} x {rows[0].in_features}",
                    span(row.weight_scale for row in rows),
                    span(row.act_scale for row in rows if row.act_scale is not None),
                    f"{min(sqnr):.1f} / {median(sqnr):.1f} dB",
                )
            )
        return align(lines)


def weight_bytes(*modules: nn.Module) -> int:
    """Sum the bytes of the distinct storages behind all modules' parameters and buffers."""
    tensors = chain.from_iterable((*m.parameters(), *m.buffers()) for m in modules)
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
