"""Test that the miniature's configuration offers the words of its world, and prompts it knows."""

import re
from pathlib import Path

import pytest

from mini.world.scenes import (
    BACKGROUNDS,
    COLOURS,
    MOTIONS,
    RELATIONS,
    SHAPES,
    SIZES,
    parse_caption,
)
from worker.config import load_config

OFFER = load_config(Path(__file__).parents[2] / "deploy" / "wan-mini.toml").model.offer("sha256:00")
WORDS = {group.kind: group.phrases for group in OFFER.vocabulary}


def test_every_wording_of_the_world_is_offered_and_no_other() -> None:
    assert {kind: set(phrases) for kind, phrases in WORDS.items()} == {
        "size": {word for words in SIZES.values() for word in words},
        "colour": set(COLOURS),
        "shape": {word for words in SHAPES.values() for word in words},
        "motion": {word for words in MOTIONS.values() for word in words},
        "background": set(BACKGROUNDS),
        "relation": {word for pair in RELATIONS.values() for words in pair for word in words},
    }


@pytest.mark.parametrize("prompt", OFFER.example_prompts)
def test_an_example_is_a_caption_of_the_world(prompt: str) -> None:
    parse_caption(prompt)
    assert len(prompt) <= OFFER.max_prompt_chars


@pytest.mark.parametrize("index", range(30))
def test_the_template_filled_with_offered_words_is_a_caption(index: int) -> None:
    template = OFFER.prompt_template
    assert template is not None
    prompt = re.sub(
        "[A-Z]{2,}",
        lambda kind: WORDS[kind[0].lower()][index % len(WORDS[kind[0].lower()])],
        template,
    )
    parse_caption(prompt)
