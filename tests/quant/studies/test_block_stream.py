"""Test that a transformer whose blocks visit the device one at a time computes the same."""

import pytest
import torch

from quant.studies.block_stream import BlockStream
from quant.studies.points import Point
from tests.quant.studies.conftest import MINIATURE, load_transformer, random_point


@pytest.fixture(scope="module")
def point() -> Point:
    return random_point()


@pytest.mark.parametrize("dtype", [torch.float32, None])
def test_a_pass_is_that_of_the_whole_transformer(point: Point, dtype: torch.dtype | None) -> None:
    whole, streamed = load_transformer(MINIATURE), load_transformer(MINIATURE)
    stream = BlockStream(streamed, torch.device("cpu"), dtype)
    if dtype is not None:
        whole = whole.to(dtype)
    inner = next(whole.patch_embedding.parameters()).dtype
    with torch.no_grad():
        expected = whole(point.latents.to(inner), point.timestep, point.text.to(inner)).sample
    assert torch.equal(stream.velocity([point]), expected)
    assert {p.dtype for p in streamed.blocks[3].attn1.parameters()} == {torch.bfloat16}


def test_a_pass_can_begin_at_any_block(point: Point) -> None:
    stream = BlockStream(load_transformer(MINIATURE), torch.device("cpu"))
    first, conditions = stream.begin([point])
    after = list(stream.passes(first, conditions))
    *_, last = stream.passes(after[29], conditions, first=30)
    assert len(after) == stream.blocks == 40
    assert torch.equal(last, after[-1])


def test_a_change_sees_each_block_and_may_replace_it(point: Point) -> None:
    stream = BlockStream(load_transformer(MINIATURE), torch.device("cpu"), keep=True)
    seen = []

    def leave_out(index: int, block: torch.nn.Module) -> torch.nn.Module:
        seen.append(index)
        return block if index != 7 else Unchanged()

    changed = stream.velocity([point], leave_out)
    assert seen == list(range(40))
    assert not torch.equal(changed, stream.velocity([point]))


def test_points_run_together() -> None:
    points = [random_point(seed) for seed in range(3)]
    stream = BlockStream(load_transformer(MINIATURE), torch.device("cpu"), keep=True)
    together = stream.velocity(points)
    alone = torch.cat([stream.velocity([each]) for each in points])
    assert torch.allclose(together, alone, rtol=1e-4, atol=1e-5)
    first, conditions = stream.begin(points[:2])
    *_, last = stream.passes(first.repeat(2, 1, 1), conditions.tiled(2))
    found = stream.end(last, conditions.tiled(2))
    assert torch.allclose(found, alone[[0, 1, 0, 1]], rtol=1e-4, atol=1e-5)
    assert stream.stream_bytes(points[0].latents) == first[:1].nbytes


class Unchanged(torch.nn.Module):
    def forward(self, hidden_states: torch.Tensor, *_: object) -> torch.Tensor:
        return hidden_states
