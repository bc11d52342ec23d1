"""Context parallelism: what the ranks exchange, and the result of a split transformer."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel

from quant.errors import ConversionError
from quant.numerics.linear import Hif8Linear
from quant.numerics.scaling import POLICIES
from quant.transformer.context_parallel import Ulysses, split_tokens

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("ranks", [2, 4])
def test_tokens_are_exchanged_for_heads_and_back(ranks: int) -> None:
    command = [sys.executable, "-m", "tests.support.ulysses_ranks", str(ranks)]
    launcher = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        errors = launcher.communicate(timeout=100)[1]
        assert launcher.returncode == 0, errors.decode()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(launcher.pid, signal.SIGKILL)


@torch.no_grad()
def test_without_a_group_the_result_is_unchanged(tiny_transformer: WanTransformer3DModel) -> None:
    x, text = torch.randn(1, 16, 2, 4, 4).bfloat16(), torch.randn(1, 8, 96).bfloat16()
    inputs = {"hidden_states": x, "timestep": torch.tensor([500]), "encoder_hidden_states": text}
    before = tiny_transformer(**inputs, return_dict=False)[0]
    split_tokens(tiny_transformer, Ulysses())
    assert torch.equal(tiny_transformer(**inputs, return_dict=False)[0], before)


def test_blocks_that_cannot_be_split_are_named(tiny_transformer: WanTransformer3DModel) -> None:
    own = tiny_transformer.blocks[1].attn1
    own.to_q = Hif8Linear.from_linear(
        own.to_q, torch.tensor(1.0), act_scale=None, act_policy=POLICIES["pow2"]
    )
    with pytest.raises(ConversionError, match=r"blocks \[1\] cannot run on several ranks"):
        split_tokens(tiny_transformer, Ulysses())
