"""Say what is trained: runs with their options, from the command line or a TOML file.

A run is one training, measured at several numbers of steps: its learning rate is constant after
the first steps, so a run that is measured at 50 steps is the run of 50 steps. For each combination
of the other options there is a control, trained alike in BF16.
"""

from __future__ import annotations

import itertools
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quant.errors import StudyError
from quant.studies.qat.straight_through import check_trainable

CONTROL = "bf16"
"""The method of the controls: BF16, which costs the velocity almost nothing."""

_MOST = 1_000_000
_KEYS = ("methods", "learning_rates", "batches", "data", "seeds")


@dataclass(frozen=True, slots=True, order=True)
class Run:
    """One training.

    Attributes:
        method: name of the way to quantize.
        batch: samples of a step.
        data: how many prompts, the first ones, are trained on; or clips, of flow matching.
        learning_rate: of Adam, after the warm-up.
        seed: of the order of samples, and of noise.
    """

    method: str
    batch: int
    data: int
    learning_rate: float
    seed: int = 0

    @property
    def name(self) -> str:
        """A name that no other run of the study has."""
        return (
            f"{self.method}/lr{self.learning_rate:g}/batch{self.batch}/data{self.data}"
            f"/seed{self.seed}"
        )

    @property
    def control(self) -> Run:
        """The same training without the method."""
        return Run(CONTROL, self.batch, self.data, self.learning_rate, self.seed)


@dataclass(frozen=True, slots=True)
class Grid:
    """All runs of a study.

    Attributes:
        runs: without controls, in the order of methods as given.
        steps: numbers of steps at which each run is measured, ascending.
    """

    runs: tuple[Run, ...]
    steps: tuple[int, ...]

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods, without the control's, in the order given."""
        return tuple(dict.fromkeys(run.method for run in self.runs))

    @property
    def controls(self) -> tuple[Run, ...]:
        """The controls, one for each combination of the other options."""
        return tuple(dict.fromkeys(run.control for run in self.runs))

    @property
    def ordered(self) -> tuple[Run, ...]:
        """All runs with the controls, so that those with equal shapes follow each other."""
        order = {name: number for number, name in enumerate((CONTROL, *self.methods))}
        return tuple(
            sorted(
                (*self.controls, *self.runs),
                key=lambda run: (order[run.method], run.batch, run.data, run.learning_rate),
            )
        )

    def check_data(self, available: int, samples: int, what: str) -> None:
        """Refuse runs that need more data than there is.

        Args:
            available: prompts, or clips.
            samples: of each of them.

        Raises:
            StudyError: names the bound.
        """
        for run in self.runs:
            if run.data > available:
                raise StudyError(
                    f"a run on {run.data} {what} needs more than the {available} there are: "
                    "record more, or give a smaller --data"
                )
            if run.batch > run.data * samples:
                raise StudyError(
                    f"a batch of {run.batch} is larger than the {run.data * samples} samples of "
                    f"{run.data} {what}: give a smaller --batches or a larger --data"
                )


def grid_of(options: Mapping[str, Sequence[Any]], steps: Sequence[int]) -> Grid:
    """Combine all values of all options; a combination that is there twice is trained once.

    Args:
        options: by the names that a file has them under.

    Raises:
        StudyError: a value is out of bounds.
    """
    return Grid(tuple(dict.fromkeys(_product(options))), _checked_steps(steps))


def read_grid(path: Path) -> Grid:
    """Read a TOML file: `steps`, and one or more tables [[grid]] with lists of options.

    Raises:
        StudyError: the file cannot be read, or a key or value is wrong.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StudyError(f"{path} cannot be read as a grid: {error}") from error
    tables, steps = data.pop("grid", None), data.pop("steps", None)
    if data or not isinstance(tables, list) or not isinstance(steps, list):
        raise StudyError(f"{path} must hold `steps`, a list, and tables [[grid]], and nothing else")
    runs: dict[Run, None] = {}
    for table in tables:
        unknown = sorted(set(table) - set(_KEYS))
        if unknown:
            raise StudyError(f"{path} has {unknown[0]!r} in [[grid]]: known are {', '.join(_KEYS)}")
        runs |= dict.fromkeys(_product({"seeds": [0], **table}))
    return Grid(tuple(runs), _checked_steps(steps))


def parse_list(text: str, kind: type[int | float | str], option: str) -> list[Any]:
    """Read values with commas, such as "1e-5,1e-4".

    Raises:
        StudyError: there is none, or one is not of that kind.
    """
    parts = [each.strip() for each in text.split(",") if each.strip()]
    try:
        values = [kind(each) for each in parts]
    except ValueError as error:
        raise StudyError(
            f"{option} {text!r} must be numbers with commas between: {error}"
        ) from error
    if not values:
        raise StudyError(f"{option} names nothing: give one or more values with commas between")
    return values


def _product(options: Mapping[str, Sequence[Any]]) -> list[Run]:
    for key in _KEYS:
        if not isinstance(options.get(key), list) or not options[key]:
            raise StudyError(f"{key} of a grid must be a list with one value or more")
    for name in options["methods"]:
        if name == CONTROL:
            raise StudyError(f"{CONTROL!r} is the control, which comes along: leave it out")
        check_trainable(str(name))
    for rate in options["learning_rates"]:
        if not isinstance(rate, int | float) or not 0 < rate < math.inf:
            raise StudyError(f"learning rate {rate!r} must be a number above 0")
    for key, least in (("batches", 1), ("data", 1), ("seeds", 0)):
        for value in options[key]:
            if type(value) is not int or not least <= value <= _MOST:
                raise StudyError(f"{value!r} in {key} must be from {least} to {_MOST:,}")
    return [
        Run(method, batch, data, float(rate), seed)
        for method, batch, data, rate, seed in itertools.product(
            *(options[key] for key in ("methods", "batches", "data", "learning_rates", "seeds"))
        )
    ]


def _checked_steps(steps: Sequence[int]) -> tuple[int, ...]:
    for step in steps:
        if type(step) is not int or not 1 <= step <= _MOST:
            raise StudyError(f"{step!r} steps must be from 1 to {_MOST:,}; 0, PTQ, comes along")
    if not steps:
        raise StudyError("give one number of steps or more")
    return tuple(sorted(set(steps)))
