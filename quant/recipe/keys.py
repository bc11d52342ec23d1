"""Check the types of a recipe's keys as they come from TOML or JSON."""

from __future__ import annotations

from typing import Any

from quant.errors import RecipeError

SCALARS: dict[str, type] = {
    "name": str,
    "description": str,
    "format": str,
    "attention": str,
    "rotate_qk": bool,
    "attention_bf16_steps": int,
    "protect": str,
    "total_blocks": int,
    "linears_per_block": int,
}
LISTS: dict[str, type] = {"protected_blocks": int, "linears": str, "kept_linears": str}


def typed(key: str, value: object) -> object:
    """Check the type of a recipe key's value and return it; lists become tuples.

    Raises:
        RecipeError: it has another type.
    """
    if key in SCALARS:
        if type(value) is not SCALARS[key]:
            raise RecipeError(f"recipe key {key} must be {SCALARS[key].__name__}, not {value!r}")
        return value
    if not isinstance(value, list) or any(type(item) is not LISTS[key] for item in value):
        raise RecipeError(
            f"recipe key {key} must be a list of {LISTS[key].__name__}, not {value!r}"
        )
    return tuple(value)


def take_scale_table(data: dict[str, Any], key: str) -> tuple[str, str]:
    """Remove table `key` from a recipe and return its granularity and policy.

    Raises:
        RecipeError: it is missing, or holds something else.
    """
    table = data.pop(key, None)
    if not isinstance(table, dict) or set(table) != {"granularity", "policy"}:
        raise RecipeError(f"recipe table [{key}] must hold granularity and policy, not {table!r}")
    for value in table.values():
        if type(value) is not str:
            raise RecipeError(f"recipe table [{key}] holds names, not {value!r}")
    return table["granularity"], table["policy"]
