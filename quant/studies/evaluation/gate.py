"""Hold an evaluation to bounds, for CI.

A gate file is TOML: a table for each judge, and one for videos that went another way.

    [psnr]
    min = 35.0               # of each candidate, in the judge's unit
    [temporal-flickering]
    min_difference = -0.002  # candidate − bf16
    [divergence]
    max_share = 0.05

A bound holds if the whole 95 % interval keeps it. Few prompts have wide intervals: they fail.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

from quant.errors import StudyError
from quant.studies.evaluation.candidates import BF16
from quant.studies.evaluation.measures import Measure
from quant.studies.evaluation.verdict import Comparison
from quant.studies.statistics import estimate

Bounds = dict[str, dict[str, float]]
_DIVERGENCE, _SHARE = "divergence", "max_share"
_KEYS = ("min", "max", "min_difference", "max_difference")


def read_gate(path: Path, judges: Mapping[str, str]) -> Bounds:
    """Read a gate file.

    Args:
        judges: what each judge of the evaluation needs, by its name.

    Raises:
        StudyError: it cannot be read, or has an unknown table, key or value.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise StudyError(f"the gate {path} cannot be read: {error}") from error
    if not data:
        raise StudyError(f"the gate {path} has no bounds: everything would pass it")
    for name, bounds in data.items():
        if name != _DIVERGENCE and name not in judges:
            raise StudyError(
                f"{path}: there is no judge {name!r} in this evaluation (there are: "
                f"{', '.join(judges)}): add --judge {name}, or remove the table"
            )
        allowed = (_SHARE,) if name == _DIVERGENCE else _KEYS
        if not isinstance(bounds, dict) or not bounds:
            raise StudyError(f"{path}: {name} must be a table with {' or '.join(allowed)}")
        for key, value in bounds.items():
            if key not in allowed:
                raise StudyError(f"{path}: {name} has no bound {key!r}: take {', '.join(allowed)}")
            _check_bound(f"{path}: {name}", key, value, judges.get(name, ""))
    return data


def _check_bound(where: str, key: str, value: object, needs: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise StudyError(f"{where}.{key} must be a number, not {value!r}")
    if not math.isfinite(value):
        raise StudyError(f"{where}.{key} must be finite, or nothing is asked")
    if key.endswith("difference") and needs == "pair":
        raise StudyError(
            f"{where} compares with BF16 already, so {key} says nothing: use "
            f"{key.partition('_')[0]}"
        )


def broken_bounds(
    bounds: Bounds,
    measures: Sequence[Measure],
    comparisons: Sequence[Comparison],
    far: Mapping[str, Sequence[int]],
) -> list[str]:
    """Return a sentence for each bound that is not kept; none if the gate is passed."""
    broken = []
    for measure in measures:
        wanted = bounds.get(measure.name, {})
        for name, values in measure.values.items():
            if name == BF16:
                continue
            each = estimate(values, measure.prompts)
            what = f"{measure.name} of {name}"
            broken += _check(what, wanted, each.low, each.high, "")
    for pair in comparisons:
        if pair.second == BF16:
            what = f"{pair.measure.name} of {pair.first} − {BF16}"
            wanted = bounds.get(pair.measure.name, {})
            broken += _check(what, wanted, pair.difference.low, pair.difference.high, "_difference")
    share = bounds.get(_DIVERGENCE, {}).get(_SHARE)
    videos = max((len(each.prompts) for each in measures if each.needs == "pair"), default=0)
    for name, places in far.items() if share is not None and videos else ():
        if len(places) > share * videos:  # type: ignore[operator]
            broken.append(
                f"{len(places)} of {videos} videos of {name} went another way, more than the share "
                f"of {share:g}"
            )
    return broken


def _check(
    what: str, bounds: Mapping[str, float], low: float, high: float, suffix: str
) -> list[str]:
    interval = f"{what} lies in [{low:.4g}, {high:.4g}]"
    broken = []
    if low < bounds.get(f"min{suffix}", low):
        broken.append(f"{interval}, not surely at or above {bounds[f'min{suffix}']:g}")
    if high > bounds.get(f"max{suffix}", high):
        broken.append(f"{interval}, not surely at or below {bounds[f'max{suffix}']:g}")
    return broken
