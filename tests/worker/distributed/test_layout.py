"""Test how ranks divide a job, and which numbers of ranks are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from worker.distributed.layout import NEGATIVE, PROMPT, RankLayout, check_ranks
from worker.errors import ConfigError


@pytest.mark.parametrize(
    ("world", "guided", "cfg", "ulysses"),
    [
        (2, True, 2, 1),
        (2, False, 1, 2),
        (4, True, 2, 2),
        (4, False, 1, 4),
        (8, True, 2, 4),
        (5, True, 1, 5),
    ],
)
def test_guidance_is_split_first(world: int, guided: bool, cfg: int, ulysses: int) -> None:
    assert RankLayout.of(world, guided) == RankLayout(world, cfg, ulysses)


def test_every_rank_has_its_branch_and_its_tokens() -> None:
    layout = RankLayout.of(4, guided=True)
    assert [layout.branch(rank) for rank in range(4)] == [PROMPT, PROMPT, NEGATIVE, NEGATIVE]
    assert [layout.ulysses_ranks(rank) for rank in range(4)] == [(0, 1), (0, 1), (2, 3), (2, 3)]
    assert [layout.cfg_ranks(rank) for rank in range(4)] == [(0, 2), (1, 3), (0, 2), (1, 3)]
    assert layout.groups() == [(0, 1), (0, 2), (1, 3), (2, 3)]


def test_groups_of_one_rank_are_left_out() -> None:
    assert RankLayout.of(2, guided=True).groups() == [(0, 1)]
    assert RankLayout.of(4, guided=False).groups() == [(0, 1, 2, 3)]


@pytest.mark.parametrize(("cfg", "ulysses"), [(3, 1), (2, 2), (0, 0)])
def test_a_layout_uses_all_ranks(cfg: int, ulysses: int) -> None:
    with pytest.raises(ValueError, match="3 ranks are not"):
        RankLayout(3, cfg, ulysses)


@pytest.fixture
def model_14b(tmp_path: Path) -> Path:
    (tmp_path / "transformer").mkdir()
    config = tmp_path / "transformer" / "config.json"
    config.write_text(json.dumps({"num_attention_heads": 40}))
    return tmp_path


SIZES_14B = ["832x480", "480x832", "1280x720", "720x1280"]


@pytest.mark.parametrize("world", [2, 4, 8])
def test_the_real_model_runs_on_any_of_the_usual_numbers(world: int, model_14b: Path) -> None:
    check_ranks(world, model_14b, SIZES_14B)


def test_heads_that_do_not_divide_are_refused(model_14b: Path) -> None:
    with pytest.raises(ConfigError, match=r"3 ranks share .* in 3 parts, which .* 40 attention"):
        check_ranks(3, model_14b, SIZES_14B)


def test_tokens_that_do_not_divide_are_refused(model_14b: Path) -> None:
    with pytest.raises(ConfigError, match=r"4 parts, which the 1590 tokens .* 848x480 do not"):
        check_ranks(4, model_14b, [*SIZES_14B, "848x480"])
