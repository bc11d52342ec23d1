"""Ascend's own compiler turns the Triton kernels into vector instructions, and into how many."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMPILER = Path(sys.prefix) / "triton-ascend-3.2"
MEMORY_BYTES = 192 << 10

CALLS = {
    "rounding": 21,
    "gelu": 10,
    "gelu + rounding": 31,
    "gated sum": 10,
    "norm": 19,
    "norm + rounding": 61,
    "sum + affine norm": 27,
    "sum + affine norm + rounding": 69,
    "gated sum + norm": 29,
    "gated sum + norm + rounding": 71,
    "rounding, divided": 25,
    "gelu + rounding, divided": 35,
    "gated sum + norm + rounding, divided": 79,
    "decode": 23,
    "decode, multiplied": 26,
    "decode by row": 26,
}
"""Vector instructions for each row or block. A row is computed in two parts, each with its own."""

Kernels = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def lowered() -> Kernels:
    """Every kernel by its name, as `tests.npu.lower_triton.Lowered`."""
    if not (COMPILER / "triton").is_dir():
        reason = COMPILER / "missing"
        pytest.skip(reason.read_text() if reason.exists() else f"{COMPILER}: run `make test`")
    environment = {**os.environ, "PYTHONPATH": f"{COMPILER}:{ROOT}", "TRITON_INTERPRET": "0"}
    run = subprocess.run(
        [sys.executable, "-m", "tests.npu.lower_triton"],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    kernels: Kernels = json.loads(run.stdout)
    return kernels


def test_kernels_have_as_many_vector_instructions_as_counted(lowered: Kernels) -> None:
    counts = {name: len(each["calls"]) for name, each in lowered.items()}
    del counts["variable shift"]
    assert counts == CALLS


def test_only_the_loop_over_rows_or_blocks_remains(lowered: Kernels) -> None:
    for name in CALLS:
        assert lowered[name]["loops"] == 1, name
        assert lowered[name]["elements"] == 0, name


def test_a_shift_that_differs_between_elements_becomes_a_loop_over_them(lowered: Kernels) -> None:
    """Why the kernels for CUDA do not serve, and that the test above would notice."""
    assert lowered["variable shift"]["elements"] > 0


def test_kernels_fit_into_a_vector_core_and_its_library(lowered: Kernels) -> None:
    for name in CALLS:
        assert 0 < lowered[name]["memory_bytes"] <= MEMORY_BYTES, name
        assert lowered[name]["unknown"] == [], name


def test_rounding_works_on_16_bits(lowered: Kernels) -> None:
    """Twice as many numbers fit into an instruction as of 32 bits."""
    assert not [name for name in lowered["rounding"]["calls"] if "float" in name or "32" in name]
    assert lowered["rounding"]["bytes_each"] == 2 * CALLS["rounding"]
