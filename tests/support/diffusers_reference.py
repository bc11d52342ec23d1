"""Give diffusers' own blocks the BF16 product that this project uses, whatever the CPU."""

from functools import partial
from typing import Any

from torch import Tensor, nn

from quant.numerics import reference


def with_our_products(transformer: Any) -> Any:
    """Replace the product of every linear in a transformer's blocks by `reference.product`.

    The two differ only on a CPU without BF16 instructions. Everything else stays diffusers' own.
    """
    for linear in (each for each in transformer.blocks.modules() if type(each) is nn.Linear):
        linear.forward = partial(_multiply, linear)  # type: ignore[method-assign]
    return transformer


def _multiply(linear: nn.Linear, x: Tensor) -> Tensor:
    return reference.product(x, linear.weight, linear.bias)
