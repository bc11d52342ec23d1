"""Name sets of blocks to protect: the paper's, the middle, the greedy and random ones."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from quant.errors import StudyError


def paper_sets(blocks: int) -> dict[str, tuple[int, ...]]:
    """Return the paper's four configurations, for a model of any number of blocks.

    Of 40 blocks the first two and the last three are protected; other numbers keep at least one at
    each end, in proportion.
    """
    entry = tuple(range(max(1, round(blocks * 2 / 40))))
    count = max(1, round(blocks * 3 / 40))
    leave = tuple(range(blocks - count, blocks))
    return {"none": (), "entry only": entry, "exit only": leave, "both ends": (*entry, *leave)}


def middle_set(blocks: int, count: int) -> tuple[int, ...]:
    """Return `count` neighbouring blocks in the middle."""
    first = (blocks - count) // 2
    return tuple(range(first, first + count))


def greedy_set(
    energy: Mapping[int, float],
    *,
    count: int | None = None,
    error_share: float | None = None,
    bytes_each: int | None = None,
    budget_bytes: int | None = None,
) -> tuple[int, ...]:
    """Choose blocks by their single error energies, the largest first, until a budget is met.

    Where energies add, no other set of this size removes more. The analysis compares sums with
    errors measured together, for a few sets; that makes it likely and no more.

    Args:
        energy: error energy of each block that could be protected.
        count: protect so many blocks.
        error_share: protect until at most this share of the sum of energies is left.
        bytes_each, budget_bytes: protect while that many more bytes fit the budget.

    Raises:
        StudyError: not exactly one budget is given, or it is out of bounds.
    """
    given = [each for each in (count, error_share, budget_bytes) if each is not None]
    if len(given) != 1:
        raise StudyError("give one budget: a number of blocks, a share of the error, or bytes")
    order = sorted(energy, key=lambda block: (-energy[block], block))
    if budget_bytes is not None:
        if not bytes_each:
            raise StudyError("a budget in bytes needs the bytes of a block")
        count = min(len(order), budget_bytes // bytes_each)
    if error_share is not None:
        if not 0 <= error_share <= 1:
            raise StudyError(f"the share of the error {error_share} must be between 0 and 1")
        left, total, count = sum(energy.values()), sum(energy.values()), 0
        while count < len(order) and left > error_share * total * (1 + 1e-12):
            left -= energy[order[count]]
            count += 1
    assert count is not None
    if not 0 <= count <= len(order):
        raise StudyError(f"{count} blocks to protect must be between 0 and {len(order)}")
    return tuple(sorted(order[:count]))


def random_sets(
    blocks: int, count: int, sets: int, seed: int, without: Sequence[Sequence[int]] = ()
) -> list[tuple[int, ...]]:
    """Draw distinct sets of `count` blocks, none of them in `without`.

    Raises:
        StudyError: there are not that many.
    """
    rng = random.Random(seed)
    taken = {tuple(sorted(each)) for each in without}
    found: list[tuple[int, ...]] = []
    for _ in range(1000 * max(sets, 1)):
        if len(found) == sets:
            return found
        drawn = tuple(sorted(rng.sample(range(blocks), count)))
        if drawn not in taken:
            taken.add(drawn)
            found.append(drawn)
    raise StudyError(
        f"there are no {sets} different sets of {count} of {blocks} blocks: ask for fewer"
    )
