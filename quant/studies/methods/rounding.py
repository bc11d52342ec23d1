"""Round weights to a format: each to the nearest value, or one column after the other (GPTQ)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from quant.errors import StudyError
from quant.studies.methods.operand import Operand

_BLOCK = 128
"""Columns whose errors are passed on within their block first, and then to all later ones."""


class Rounding(Protocol):
    """A rule that rounds a linear's weights."""

    @property
    def needs_hessian(self) -> bool:
        """Whether `round` needs the inputs' second moments, from calibration."""

    def round(self, weight: Tensor, operand: Operand, hessian: Tensor | None) -> Tensor:
        """Round weight [N, K] → [N, K] float32; hessian [K, K] is the sum of x xᵀ over tokens."""


@dataclass(frozen=True, slots=True)
class Nearest:
    """Round each weight to the nearest value."""

    needs_hessian: ClassVar[bool] = False

    def round(self, weight: Tensor, operand: Operand, hessian: Tensor | None) -> Tensor:
        """Round; `hessian` is not used."""
        del hessian
        return operand.round(weight.float())


@dataclass(frozen=True, slots=True)
class Gptq:
    """Round column by column, and let later columns make up for each one's error (Frantar 2023).

    Scales are those of the unchanged weights. Columns are taken in their order, and the Hessian is
    of the inputs that the exact model has.

    Attributes:
        damping: share of the Hessian's mean diagonal that is added to its diagonal.
    """

    damping: float = 0.01

    needs_hessian: ClassVar[bool] = True

    def round(self, weight: Tensor, operand: Operand, hessian: Tensor | None) -> Tensor:
        """Round.

        Raises:
            StudyError: the Hessian cannot be factorized even when damped.
        """
        assert hessian is not None, "calibration sums it up"
        left = weight.float().clone()
        scale = operand.scale_of(left)
        factor = self._factor(hessian, left)
        rounded = torch.zeros_like(left)
        for first in range(0, left.shape[1], _BLOCK):
            last = min(first + _BLOCK, left.shape[1])
            errors = torch.zeros_like(left[:, first:last])
            for column in range(first, last):
                now = left[:, column : column + 1]
                rounded[:, column : column + 1] = operand.round(now, scale)
                error = (now - rounded[:, column : column + 1]) / factor[column, column]
                left[:, column:last] -= error * factor[column, column:last]
                errors[:, column - first] = error[:, 0]
            left[:, last:] -= errors @ factor[first:last, last:]
        return rounded

    def _factor(self, hessian: Tensor, weight: Tensor) -> Tensor:
        """Return the upper Cholesky factor [K, K] of the inverse; unused weights become 0."""
        damped = hessian.float().clone()
        diagonal = damped.diagonal()
        unused = diagonal == 0
        diagonal[unused] = 1
        weight[:, unused] = 0
        diagonal += self.damping * diagonal.mean()
        try:
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
            factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
        except RuntimeError as error:
            raise StudyError(
                f"the inputs of a linear with {len(damped)} channels give a Hessian that GPTQ "
                "cannot factorize: calibrate on more points"
            ) from error
        return factor
