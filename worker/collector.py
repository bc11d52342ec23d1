"""Python's collector of cyclic garbage, and when there is none to look for."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def resting_collector() -> Iterator[None]:
    """Have no garbage looked for within, and nothing that is left afterwards looked through again.

    What is imported and loaded stays. Hundreds of thousands of new objects would set off the
    collector time and again, and each time it would walk all of torch: a quarter of what the
    imports take (`worker.__main__`), and most of what a transformer's modules would. Later it would
    walk the model in the middle of a job.
    """
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.collect()  # what a loading left in cycles may hold weights
        gc.freeze()
        gc.enable()
