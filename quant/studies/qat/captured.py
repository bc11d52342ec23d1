"""Replay work on a GPU as one CUDA graph.

A step of a small model launches tens of thousands of kernels, most of them to round, and launching
takes longer than running them. What is captured must do the same operations on the same tensors
each time, and wait for nothing. On other devices the work is simply done.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_WARM_UP = 3


class Captured:
    """A function without arguments, captured on a GPU when it is first called.

    The first call runs it a few times more than once, so it may only be called where that does no
    harm: before weights are reset, or if it changes nothing but its result.
    """

    def __init__(self, work: Callable[[], Any], device: torch.device, *, capture: bool) -> None:
        """Wrap `work`.

        Args:
            capture: whether to capture it, if the device is a GPU.
        """
        self._work = work
        self._captures = capture and device.type == "cuda"
        self._graph: torch.cuda.CUDAGraph | None = None
        self._result: Any = None

    def prepare(self) -> None:
        """Capture now; on other devices do nothing."""
        if not self._captures or self._graph is not None:
            return
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                self._work()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._result = self._work()
        self._graph = graph

    def __call__(self) -> Any:
        """Do the work; return its result, which the next call overwrites on a GPU."""
        if not self._captures:
            return self._work()
        self.prepare()
        assert self._graph is not None
        self._graph.replay()
        return self._result
