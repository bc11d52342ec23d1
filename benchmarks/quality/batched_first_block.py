"""Run diffusers' first-block cache on a batch, with a decision for each sample.

Diffusers decides once for all samples of a batch, and a worker runs one sample at a time. Here all
blocks run in every pass, and a sample whose first block has changed little takes what it would have
had. So a batch gives what its samples give one by one, but for the last bits, and saves no time: it
is for a GPU that a small model does not keep busy.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.hooks.hooks import BaseState, HookRegistry, ModelHook, StateManager
from torch import Tensor

_NAME = "batched_first_block"


@contextmanager
def first_block_cache(transformer: Any, threshold: float) -> Iterator[list[Tensor]]:
    """Cache within the context; yield a list that gets [B] bool in each pass: who is left out.

    Args:
        transformer: a `WanTransformer3DModel` that has no cache; its blocks may be fused.
        threshold: as of diffusers' `FirstBlockCacheConfig`.
    """
    passes: list[Tensor] = []
    states = StateManager(_State)
    hooks = {0: _Head(states, threshold, passes), -1: _Tail(states)}
    registry = HookRegistry.check_if_exists_or_initialize(transformer)
    for place, hook in hooks.items():
        block = transformer.blocks[place]
        HookRegistry.check_if_exists_or_initialize(block).register_hook(hook, _NAME)
    registry.invalidate_child_registries_cache()
    try:
        yield passes
    finally:
        for place in hooks:
            transformer.blocks[place]._diffusers_hook.remove_hook(_NAME, recurse=False)
        registry.invalidate_child_registries_cache()


class _State(BaseState):  # type: ignore[misc]
    """What is kept from pass to pass of one kind, with the prompt or with the negative prompt.

    Attributes:
        head: output of the first block in this pass, [B, S, K].
        left_out: samples whose other blocks do not count in this pass, [B].
        head_residual, tail_residual: what the first block has added, and what the others have, in
            the last pass that counted, [B, S, K]; None before there is one.
    """

    head: Tensor
    left_out: Tensor
    head_residual: Tensor | None = None
    tail_residual: Tensor | None = None

    def reset(self) -> None:
        self.head_residual = self.tail_residual = None


class _Head(ModelHook):  # type: ignore[misc]
    _is_stateful = True

    def __init__(self, states: StateManager, threshold: float, passes: list[Tensor]) -> None:
        super().__init__()
        self.states = states
        self._threshold = threshold
        self._passes = passes

    def new_forward(self, _block: Any, hidden_states: Tensor, *rest: Any, **named: Any) -> Tensor:
        output: Tensor = self.fn_ref.original_forward(hidden_states, *rest, **named)
        state, residual = self.states.get_state(), output - hidden_states
        before = state.head_residual
        if before is None:
            state.left_out = torch.zeros(len(output), dtype=torch.bool, device=output.device)
        else:
            change = (residual - before).abs().mean((1, 2)) / before.abs().mean((1, 2))
            state.left_out = change.float() <= self._threshold
            residual = torch.where(state.left_out[:, None, None], before, residual)
        state.head, state.head_residual = output, residual
        self._passes.append(state.left_out)
        return output

    def reset_state(self, module: Any) -> Any:
        self.states.reset()
        return module


class _Tail(ModelHook):  # type: ignore[misc]
    def __init__(self, states: StateManager) -> None:
        super().__init__()
        self.states = states

    def new_forward(self, _block: Any, *inputs: Any, **named: Any) -> Tensor:
        output: Tensor = self.fn_ref.original_forward(*inputs, **named)
        state = self.states.get_state()
        residual, before = output - state.head, state.tail_residual
        if before is not None:
            out = state.left_out[:, None, None]
            residual = torch.where(out, before, residual)
            output = torch.where(out, before + state.head, output)
        state.tail_residual = residual
        return output
