"""Captions: every wording describes one scene, and no caption is in two splits."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mini.world.scenes import (
    BACKGROUNDS,
    COLOURS,
    EXAMPLE,
    MOTIONS,
    RELATIONS,
    SHAPES,
    SIZES,
    Scene,
    Split,
    Thing,
    caption,
    parse_caption,
    plain_caption,
    sample_scene,
    split_of,
)


@given(st.integers(0, 2**32), st.sampled_from(Split))
def test_every_wording_is_read_back_as_its_scene(seed: int, split: Split) -> None:
    rng = random.Random(seed)
    scene = sample_scene(rng, split)
    assert split_of(scene) is split
    assert parse_caption(caption(scene, rng)) == scene
    assert parse_caption(plain_caption(scene)) == scene


def test_each_fact_has_several_wordings() -> None:
    captions = {caption(EXAMPLE, random.Random(seed)) for seed in range(4000)}
    # 3 sizes x 2 shapes x 3 motions x 2 grounds x 3 orders
    assert len(captions) == 108
    assert {parse_caption(text) for text in captions} == {EXAMPLE}


def test_both_wordings_of_a_relation_describe_one_scene() -> None:
    direct = parse_caption(
        "a small red circle left of a large blue star both moving up on a black background"
    )
    inverse = parse_caption(
        "a large blue star right of a small red circle both moving up on a black background"
    )
    assert direct == inverse
    assert direct.relation == "left"
    assert direct.things[0] == Thing("small", "red", "circle")


def test_splits_share_no_caption() -> None:
    drawn = {}
    for split in Split:
        rng = random.Random(5)
        drawn[split] = {caption(sample_scene(rng, split), rng) for _ in range(3000)}
    assert not drawn[Split.TRAIN] & drawn[Split.CALIBRATION]
    assert not drawn[Split.TRAIN] & drawn[Split.EVALUATION]
    assert not drawn[Split.CALIBRATION] & drawn[Split.EVALUATION]


def test_splits_have_their_shares_and_every_fact_is_trained_on() -> None:
    rng = random.Random(1)
    singles = [
        Scene((Thing(size, colour, shape),), motion, background)
        for size in SIZES
        for colour in COLOURS
        for shape in SHAPES
        for motion in MOTIONS
        for background in BACKGROUNDS
    ]
    shares = [sum(split_of(s) is split for s in singles) / len(singles) for split in Split]
    assert shares[0] == pytest.approx(0.90, abs=0.02)
    assert shares[1] == pytest.approx(0.05, abs=0.02)
    assert shares[2] == pytest.approx(0.05, abs=0.02)
    trained = [sample_scene(rng, Split.TRAIN) for _ in range(2000)]
    assert {scene.motion for scene in trained} == set(MOTIONS)
    assert {scene.background for scene in trained} == set(BACKGROUNDS)
    assert {scene.relation for scene in trained} == {None, *RELATIONS}
    assert {(t.size, t.colour, t.shape) for s in trained for t in s.things} == {
        (size, colour, shape) for size in SIZES for colour in COLOURS for shape in SHAPES
    }


def test_other_text_is_refused_with_an_example() -> None:
    with pytest.raises(ValueError, match=r"a cat on a sofa.*an example is.*small red circle"):
        parse_caption("a cat on a sofa")
