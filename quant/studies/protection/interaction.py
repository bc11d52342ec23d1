"""Ask whether 8-bit attention and quantized linears add up, with sets of protected blocks.

In every block that is not protected, self-attention rounds queries, keys and values to HiFloat8 as
`quant.studies.methods.attention` does. If both errors are independent, the energy of both together
is the sum of each alone, and a set that is good for one is judged as for both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from torch import nn

from quant.studies.block_stream import Change
from quant.studies.methods.attention import RoundedAttention
from quant.studies.methods.formats import HIF8
from quant.studies.output.study_folder import Json
from quant.studies.output.table import Column, Table
from quant.studies.protection.analyze import Subject
from quant.studies.protection.variants import BlockQuantizer
from quant.studies.statistics import estimate, paired_difference
from quant.transformer.module_tree import share_tree

_ALONE, _BOTH = "attention alone: ", "with attention: "


@dataclass(frozen=True, slots=True)
class Protection:
    """What stays in BF16: whole blocks, and linears by the end of their name.

    Attributes:
        kept: such as "ffn.net.2", in every block.
        linears: whether the other blocks' linears are quantized.
        attention: whether the other blocks' self-attention is.
    """

    blocks: tuple[int, ...]
    kept: str = ""
    linears: bool = True
    attention: bool = False


def with_attention(sets: Mapping[str, Protection]) -> dict[str, Protection]:
    """Return two more for each set: its attention quantized alone, and beside its linears."""
    alone = {
        f"{_ALONE}{name}": Protection(each.blocks, linears=False, attention=True)
        for name, each in sets.items()
    }
    both = {
        f"{_BOTH}{name}": Protection(each.blocks, attention=True) for name, each in sets.items()
    }
    return alone | both


def is_of_attention(name: str) -> bool:
    """Return whether a set's name is one of `with_attention`'s."""
    return name.startswith((_ALONE, _BOTH))


def change_of(subject: Subject, quantizer: BlockQuantizer, protection: Protection) -> Change:
    """Return the change of a pass in which everything but the protected is quantized."""

    def change(index: int, block: nn.Module) -> nn.Module:
        if index in protection.blocks:
            return block
        names = [
            name
            for name in subject.full_names(index)
            if not (protection.kept and name.endswith(protection.kept))
        ]
        if protection.linears:
            block = quantizer.variant(index, block, names)
        if protection.attention:
            block = share_tree(block, lambda _name, _module: None)  # a variant may be used again
            block.get_submodule("attn1").processor = RoundedAttention(HIF8)  # type: ignore[assignment]
        return block

    return change


def interactions(
    energy: Mapping[str, Sequence[float]], owners: Sequence[str]
) -> tuple[Json, Table | None]:
    """Compare, for every set, both errors together with the sum of each alone.

    Args:
        energy: of each set at each point.
        owners: the prompt of each point.

    Returns:
        Results and table; the table is None if no set has been measured with attention.
    """
    results: Json = {}
    rows = []
    for name in energy:
        if f"{_BOTH}{name}" not in energy:
            continue
        linears, alone, both = energy[name], energy[f"{_ALONE}{name}"], energy[f"{_BOTH}{name}"]
        total = [a + b for a, b in zip(linears, alone, strict=True)]
        difference = paired_difference(both, total, owners)
        found = {
            "linears": asdict(estimate(linears, owners)),
            "attention": asdict(estimate(alone, owners)),
            "both": asdict(estimate(both, owners)),
            "both_minus_sum": {**asdict(difference), "real": difference.is_real},
        }
        results[name] = found
        means = [100 * found[kind]["mean"] for kind in ("linears", "attention", "both")]
        bounds = [100 * each for each in (difference.mean, difference.low, difference.high)]
        rows.append((name, *means, *bounds))
    columns = (
        Column("protected"),
        Column("linears alone, %", 4),
        Column("attention alone, %", 4),
        Column("both, %", 4),
        Column("both minus the sum, %", 4),
        Column("95 % from", 4),
        Column("to", 4),
    )
    return results, Table(columns, rows) if rows else None
