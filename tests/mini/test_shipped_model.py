"""models/wan-mini as committed: its size, its stored dtypes, and that it follows a caption.

Rates over many captions are measured by benchmarks/quality/miniature.py.
"""

from pathlib import Path

import pytest
from diffusers import WanPipeline
from safetensors import safe_open

from mini.evaluate import load_pipeline, sample
from mini.world.oracle import verdicts
from mini.world.scenes import EXAMPLE, Split, captions_of, parse_caption, plain_caption, split_of

MODEL = Path(__file__).parents[2] / "models" / "wan-mini"
WEIGHTS_LIMIT_BYTES = 32_000_000


@pytest.fixture(scope="module")
def pipeline() -> WanPipeline:
    return load_pipeline(MODEL, "cpu")


def test_weights_fit_the_repository() -> None:
    files = list(MODEL.rglob("*.safetensors"))
    assert len(files) == 6  # transformer, text encoder, VAE, scales of three recipes
    assert sum(file.stat().st_size for file in files) <= WEIGHTS_LIMIT_BYTES


@pytest.mark.parametrize(
    ("weights_file", "dtype"),
    [
        ("transformer/diffusion_pytorch_model", "BF16"),
        ("text_encoder/model", "BF16"),
        ("vae/diffusion_pytorch_model", "F16"),
    ],
)
def test_weights_are_stored_in_two_bytes(weights_file: str, dtype: str) -> None:
    with safe_open(MODEL / f"{weights_file}.safetensors", framework="pt") as weights:
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {dtype}  # noqa: SIM118


def test_it_was_calibrated_on_calibration_captions_only() -> None:
    prompts = (MODEL / "calibration-prompts.txt").read_text().splitlines()
    assert prompts == captions_of(Split.CALIBRATION, 32)
    assert {split_of(parse_caption(prompt)) for prompt in prompts} == {Split.CALIBRATION}


def test_it_shows_the_example(pipeline: WanPipeline) -> None:
    (video,) = sample(pipeline, [plain_caption(EXAMPLE)], seeds=[7])
    shown = verdicts(video, EXAMPLE)
    assert shown == dict.fromkeys(shown, True)


def test_captions_fit_the_service_s_text_length(pipeline: WanPipeline) -> None:
    tokens = pipeline.tokenizer(captions_of(Split.EVALUATION, 2000)).input_ids
    assert max(map(len, tokens)) <= 40
    assert pipeline.tokenizer.unk_token_id not in {token for ids in tokens for token in ids}
