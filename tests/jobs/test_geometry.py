"""Test the mapping from a video's size and frames to latents and tokens."""

import pytest

from jobs import geometry


def test_a_size_is_read_as_width_and_height() -> None:
    assert geometry.parse_size("832x480") == (832, 480)


@pytest.mark.parametrize("size", ["832", "832x", "832x480x3", "WxH"])
def test_a_malformed_size_is_an_error(size: str) -> None:
    with pytest.raises(ValueError, match=r"unpack|invalid literal"):
        geometry.parse_size(size)


def test_frame_counts_have_the_form_4k_plus_1() -> None:
    assert [n for n in range(12) if geometry.is_frame_count(n)] == [1, 5, 9]


def test_frames_after_the_first_are_packed_by_four() -> None:
    assert [geometry.latent_frames(n) for n in (1, 5, 17, 81)] == [1, 2, 5, 21]


def test_tokens_of_the_large_model() -> None:
    assert geometry.tokens_per_frame(832, 480) == 1560
    assert geometry.sequence_tokens(832, 480, 81) == 32_760
    assert geometry.sequence_tokens(96, 96, 17) == 180
