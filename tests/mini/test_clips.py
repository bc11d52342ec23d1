"""Test that clips of the miniature's world are written without loss, with their captions."""

import random
from pathlib import Path

import numpy as np
from typer.testing import CliRunner

from mini.cli import app
from mini.world.render import render_scene
from mini.world.scenes import Split, captions_of, parse_caption
from quant.studies.evaluation.video_files import Video


def test_clips_are_the_rendered_scenes_to_the_last_bit(tmp_path: Path) -> None:
    out = tmp_path / "clips"
    arguments = ["clips", "evaluation", "--count", "2", "--seed", "3", "--out", str(out)]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    captions = (out / "captions.txt").read_text().splitlines()
    assert captions == captions_of(Split.EVALUATION, 2, 3)
    rng = random.Random("evaluation layouts 3")
    for number, caption in enumerate(captions):
        expected = render_scene(parse_caption(caption), rng).numpy()
        assert np.array_equal(Video("", 0, out / f"{number:05d}").frames(), expected)
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 1
    assert "exists already: name another folder" in again.output
