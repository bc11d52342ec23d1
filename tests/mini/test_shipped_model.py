"""models/wan-mini as committed: its size, its stored dtypes, and that it follows a caption.

Rates over many captions are measured by benchmarks/quality/miniature.py.
"""

import hashlib
import json
from pathlib import Path

import pytest
from diffusers import WanPipeline
from safetensors import safe_open

from mini.distillation.adapters import merge_file
from mini.distillation.run import LORA_FILE
from mini.distillation.schedule import euler_scheduler
from mini.evaluate import load_pipeline, sample
from mini.world.oracle import verdicts
from mini.world.scenes import EXAMPLE, Split, captions_of, parse_caption, plain_caption, split_of

MODEL = Path(__file__).parents[2] / "models" / "wan-mini"
LORA = MODEL / "loras" / "4-steps" / LORA_FILE
WEIGHTS_LIMIT_BYTES = 33_000_000
LORA_LIMIT_BYTES = 2_000_000


@pytest.fixture(scope="module")
def pipeline() -> WanPipeline:
    return load_pipeline(MODEL, "cpu")


def test_weights_fit_the_repository() -> None:
    files = list(MODEL.rglob("*.safetensors"))
    # Transformer, text encoder, VAE, a LoRA, and scales of three recipes, one also with the LoRA.
    assert len(files) == 8
    assert sum(file.stat().st_size for file in files) <= WEIGHTS_LIMIT_BYTES
    assert LORA.stat().st_size <= LORA_LIMIT_BYTES


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


def test_the_lora_comes_with_its_card_and_is_of_this_transformer() -> None:
    folder = LORA.parent
    assert {"README.md", "distill.json", "contact-sheet.png"} <= {
        file.name for file in folder.iterdir()
    }
    figures = json.loads((folder / "distill.json").read_text())
    weights = MODEL / "transformer" / "diffusion_pytorch_model.safetensors"
    assert figures["transformer_sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert figures["settings"]["student_steps"] == 4


def test_it_shows_the_example_in_four_steps_with_the_lora() -> None:
    pipeline = load_pipeline(MODEL, "cpu")
    pipeline.register_modules(scheduler=euler_scheduler(pipeline.scheduler.config))
    merge_file(pipeline.transformer, LORA)
    (video,) = sample(pipeline, [plain_caption(EXAMPLE)], seeds=[7], steps=4, guidance_scale=1.0)
    shown = verdicts(video, EXAMPLE)
    assert shown == dict.fromkeys(shown, True)


def test_captions_fit_the_service_s_text_length(pipeline: WanPipeline) -> None:
    tokens = pipeline.tokenizer(captions_of(Split.EVALUATION, 2000)).input_ids
    assert max(map(len, tokens)) <= 40
    assert pipeline.tokenizer.unk_token_id not in {token for ids in tokens for token in ids}
