"""Count the steps of a denoising loop, whose first ones may have exact attention.

The first steps decide where things go in a video. So FP8 attention and sparse attention may begin
after some of them (`QuantRecipe.exact_attention_steps`). Steps are counted within a run, which is
one denoising loop (`denoising_run`), and separately for each prompt: with guidance a step has two
passes. A pass of no run is none of the first ones.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Branch:
    """The passes of one prompt in a run.

    Attributes:
        prompt: the tensor by which a pass is known to be of this branch.
        step: number of the present pass, from 0.
        kept: what attention keeps for later steps, by block of the transformer.
    """

    prompt: Any
    step: int
    kept: dict[int, Any] = field(default_factory=dict)


class AttentionSteps:
    """The steps of one transformer's runs.

    Attributes:
        branch: the branch of the present pass.
    """

    def __init__(self, exact_steps: int) -> None:
        """Count from the first step of each run; attention is exact in the first `exact_steps`."""
        self.exact_steps = exact_steps
        self.branch = Branch(None, exact_steps)
        self._branches: dict[int, Branch] | None = None

    def __str__(self) -> str:
        return f"self-attention in BF16 in the first {self.exact_steps} steps"

    @contextmanager
    def run(self) -> Iterator[None]:
        """Count steps, and keep what attention keeps, within the context."""
        self._branches = {}
        try:
            yield
        finally:
            # What is kept may take hundreds of megabytes.
            self._branches, self.branch = None, Branch(None, self.exact_steps)

    def is_exact(self) -> bool:
        """Return whether attention is exact in the present pass."""
        return self.branch.step < self.exact_steps

    def follow(self, transformer: Any) -> None:
        """Count the passes of a `WanTransformer3DModel` from now on."""
        signature = inspect.signature(transformer.forward)

        def begin(_: Any, args: tuple[Any, ...], inputs: dict[str, Any]) -> None:
            self._begin_pass(signature.bind(*args, **inputs).arguments["encoder_hidden_states"])

        def end(*_: Any) -> None:
            if self._branches is None:  # nothing is kept for a pass that has no next one
                self.branch = Branch(None, self.exact_steps)

        transformer.register_forward_pre_hook(begin, with_kwargs=True)
        transformer.register_forward_hook(end)
        transformer.attention_steps = self

    def _begin_pass(self, prompt: Any) -> None:
        if self._branches is None:
            self.branch = Branch(prompt, self.exact_steps)
            return
        self.branch = self._branches.setdefault(id(prompt), Branch(prompt, -1))
        self.branch.step += 1


def attention_steps_of(transformer: Any) -> AttentionSteps | None:
    """Return the steps of a transformer's runs; None if attention is the same in all of them."""
    found: AttentionSteps | None = getattr(transformer, "attention_steps", None)
    return found


@contextmanager
def denoising_run(transformer: Any) -> Iterator[None]:
    """Denoise once within the context; if attention is the same in every step, change nothing.

    Passes are told apart by the tensor of their prompt. So the prompt and the negative prompt must
    be two tensors, the same ones in all steps, also if their texts are equal.
    """
    steps = attention_steps_of(transformer)
    if steps is None:
        yield
        return
    with steps.run():
        yield
