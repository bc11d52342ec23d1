"""Test that denoising stays on the card: no float64, nothing on the CPU instead, no copy back."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.npu.card.conftest import Worker
from tests.npu.stand_in import simulated
from tests.support.job_controls import IgnoringControl
from tests.support.requests import OWNER, generation_request

pytestmark = pytest.mark.npu

STEPS = 4


class Recorder(TorchDispatchMode):
    """Counts the operations on tensors of a card: all, those that see float64, and copies back."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()
        self.float64: Counter[str] = Counter()
        self.to_host: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function._schema.name
        tensors = [each for each in tree_leaves((args, kwargs, result)) if isinstance(each, Tensor)]
        on_card = [each for each in tensors if each.device.type == "npu"]
        if on_card:
            self.ops[name] += 1
            if any(each.dtype is torch.float64 for each in on_card):
                self.float64[name] += 1
            if name == "aten::_local_scalar_dense" or self._goes_to_host(name, args, result):
                self.to_host[name] += 1
        return result

    @staticmethod
    def _goes_to_host(name: str, args: Any, result: Any) -> bool:
        if name not in ("aten::copy_", "aten::_to_copy") or result.device.type != "cpu":
            return False
        return any(isinstance(each, Tensor) and each.device.type == "npu" for each in args)


@pytest.mark.parametrize("mode", ["bf16", "w8a8"])
def test_a_jobs_steps_stay_on_the_card(
    on_card: Worker, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, recorder = on_card.engine, Recorder()
    denoise, fallbacks = engine._denoise, Counter[str]()

    def recorded(*args: Any) -> Tensor:
        card = simulated.active
        before = Counter() if card is None else Counter(card.fallbacks)
        with recorder:
            latents = denoise(*args)
        if card is not None:
            fallbacks.update(card.fallbacks - before)
        return latents

    monkeypatch.setattr(engine, "_denoise", recorded)
    request = generation_request(mode=mode, num_frames=5, num_inference_steps=STEPS)
    clip = engine.generate(request, IgnoringControl(), OWNER)
    clip.frames.close()
    assert sum(recorder.ops.values()) > 1000 * STEPS, "the loop was not recorded"
    assert recorder.float64 == {}
    assert recorder.to_host == {}
    assert fallbacks == {}, "operations that torch_npu would run on the CPU"
