"""diffusers' own blocks, on whatever CPU a test runs."""

from functools import partial
from typing import Any

from torch import Tensor, nn

from quant.numerics import reference


def with_our_products(transformer: Any) -> Any:
    """Have the linears in a transformer's blocks multiply as ours do on a CPU that has no BF16
    instructions; where it has them nothing changes. Everything else stays diffusers'."""
    for linear in (each for each in transformer.blocks.modules() if type(each) is nn.Linear):
        linear.forward = partial(_multiply, linear)  # type: ignore[method-assign]
    return transformer


def _multiply(linear: nn.Linear, x: Tensor) -> Tensor:
    return reference.product(x, linear.weight, linear.bias)
