"""Counted bytes are those that operations move, and what the document says of them."""

import inspect
from pathlib import Path

import pytest
import torch

from benchmarks.fixtures.traffic_counter import Traffic, TrafficCounter
from benchmarks.speed import vector_traffic
from benchmarks.speed.vector_traffic import LAUNCHES, count_all, estimate, markdown
from quant.kernels import ascend_triton

ROOT = Path(__file__).resolve().parents[2]


def test_an_operation_counts_what_it_reads_and_writes() -> None:
    x, y = (torch.empty(100, dtype=torch.bfloat16, device="meta") for _ in range(2))
    with TrafficCounter() as counter:
        traffic = counter.traffic
        z = x + y
        assert traffic.vector_bytes == 600
        z.add_(x)
        assert traffic.vector_bytes == 1200
        torch.add(x, y, out=z)
        assert traffic.vector_bytes == 1800
        z.copy_(x)
        assert traffic.vector_bytes == 2200
        z.view(10, 10)[2:].transpose(0, 1)
        torch.empty_like(z)
        assert traffic.vector_bytes == 2200
        x.view(10, 10) @ y.view(10, 10)
        assert (traffic.vector_bytes, traffic.products) == (2200, 600)
    assert traffic.calls == 4


def test_what_is_alive_at_once_is_counted() -> None:
    with TrafficCounter() as counter:
        x = torch.empty(100, dtype=torch.uint8, device="meta")
        for _ in range(3):
            y = torch.empty(50, dtype=torch.uint8, device="meta")
            del y
        x.view(10, 10)
    assert counter.traffic.peak_bytes == 150


@pytest.mark.parametrize("name", LAUNCHES)
def test_launches_are_declared_pointer_by_pointer(name: str) -> None:
    kernel = getattr(ascend_triton, name)
    pointers = {each for each in inspect.signature(kernel.fn).parameters if each.endswith("_ptr")}
    launch = LAUNCHES[name]
    assert set(launch.reads) | set(launch.writes) == pointers
    source = inspect.getsource(kernel.fn)
    assert all(each in source.partition("):")[2] for each in pointers)


def test_all_launched_kernels_are_declared() -> None:
    source = inspect.getsource(ascend_triton.AscendTritonKernels)
    launched = {
        line.strip().partition("[self._grid")[0]
        for line in source.split("\n")
        if "[self._grid" in line
    }
    assert launched == set(LAUNCHES)


@pytest.fixture(scope="module")
def counted() -> dict[str, Traffic]:
    return count_all()


GOALS = {
    "w8a8 packed, ascend": 7.0,
    "w8a8 bf16_grid, ascend": 7.0,
    "w8a8 packed, ascend+triton": 2.0,
    "w8a8 bf16_grid, ascend+triton": 2.0,
}


@pytest.mark.parametrize("name", GOALS)
def test_hif8_adds_at_most_so_many_seconds_to_a_step(
    counted: dict[str, Traffic], name: str
) -> None:
    assert estimate(counted, name).over_published <= GOALS[name]


def test_without_kernels_it_added_45_seconds(counted: dict[str, Traffic]) -> None:
    before = estimate(counted, "w8a8 packed, diffusers' blocks")
    assert before.over_published == pytest.approx(45, abs=2)


def test_decoding_once_saves_what_decoding_moves(counted: dict[str, Traffic]) -> None:
    for kernels, bytes_a_weight in (("ascend", 77.0), ("ascend+triton", 3.0)):
        packed, grid = (counted[f"w8a8 {each}, {kernels}"] for each in ("packed", "bf16_grid"))
        weights = 6 * 5120**2 + 2 * 5120 * 13824  # without keys and values of the prompt
        saved = (packed.vector_bytes - grid.vector_bytes) / weights
        assert saved == pytest.approx(bytes_a_weight, rel=0.05)


def test_the_document_has_what_is_counted(counted: dict[str, Traffic]) -> None:
    document = (ROOT / "docs" / "ascend.md").read_text(encoding="utf-8")
    table = markdown(counted)
    assert table in document, f"python -m benchmarks.speed.vector_traffic prints:\n{table}"


def test_a_smaller_block_moves_less() -> None:
    small = count_all(width=256, tokens=64)
    assert small.keys() == {case.name for case in vector_traffic.cases()}
    assert all(0 < each.vector_bytes < 1e9 for each in small.values())
