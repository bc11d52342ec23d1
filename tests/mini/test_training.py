"""Training at a size that says nothing about quality: it runs, goes on, and saves its weights."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline
from torch import nn

from mini.corpus import tokenize
from mini.scenes import Split, captions_of
from mini.stepping import Optimizer, TrainingStep
from mini.train import TrainingRun
from mini.train_denoiser import encode_text
from mini.training_settings import DenoiserSettings, TrainingSettings, VaeSettings

# Under autocast torch says that BF16 activations meet FP32 norm weights; that is what autocast is.
pytestmark = pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")

TINY = TrainingSettings(
    vae=VaeSettings(pool=2, image_s=0.1, clip_s=0.1, image_batch=2, clip_batch=1, check_clips=1),
    denoiser=DenoiserSettings(
        seconds=1.0, corpus=4, batch=1, long_text_share=0.5, checks=2, check_prompts=0
    ),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TrainingRun:
    """A finished VAE and a denoiser stopped halfway."""
    work = tmp_path_factory.mktemp("training")
    run = TrainingRun(work, TINY, "cpu")
    run.vae()
    assert run.denoiser(until=0.5) >= 0.5
    return run


def test_a_later_run_goes_on_and_saves_a_pipeline(run: TrainingRun, tmp_path: Path) -> None:
    log = run.work / "log.jsonl"
    before = log.read_text()
    later = TrainingRun(run.work, TINY, "cpu")
    later.vae()
    for name, tensor in run.model.vae.state_dict().items():
        assert torch.equal(tensor, later.model.vae.state_dict()[name]), name
    # Settings ask for no more time than is spent: nothing is trained, the average is kept.
    done = TrainingRun(
        run.work, replace(TINY, denoiser=replace(TINY.denoiser, seconds=1e-6)), "cpu"
    )
    done.vae()
    assert done.denoiser() == 1.0
    steps = [json.loads(line) for line in before.splitlines()]
    assert [s["stage"] for s in steps].count("corpus") == 1

    done.save(tmp_path / "model")
    pipeline = WanPipeline.from_pretrained(tmp_path / "model")
    saved = pipeline.transformer.state_dict()
    for name, tensor in done.model.transformer.state_dict().items():
        assert torch.equal(saved[name], tensor.bfloat16().float()), name
    assert json.loads((tmp_path / "model" / "training.json").read_text())["vae"]["pool"] == 2


def test_latent_statistics_are_measured(run: TrainingRun) -> None:
    config = run.model.vae.config
    assert all(std > 0 and std != 1.0 for std in config.latents_std)
    assert len(set(config.latents_mean)) == 16


def test_text_is_encoded_as_the_pipeline_encodes_it(run: TrainingRun) -> None:
    texts = [*captions_of(Split.TRAIN, 3, seed=4), ""]
    pipeline = run.model.pipeline()
    expected, _ = pipeline.encode_prompt(
        texts, do_classifier_free_guidance=False, max_sequence_length=64
    )
    with torch.no_grad():
        ours = encode_text(run.model.text_encoder, tokenize(run.model.tokenizer, texts))
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


def test_the_learning_rate_follows_the_clock() -> None:
    layer = nn.Linear(4, 4)
    optimizer = Optimizer(layer.parameters(), peak_lr=0.1, seconds=100.0, warm_up_steps=2)
    rates = []
    for spent in (0.0, 1.0, 2.0, 64.0, 82.5, 100.0):
        optimizer.spent_s = spent
        optimizer.resume()
        optimizer.tick()
        rates.append(float(optimizer.lr))
    assert rates[0] == pytest.approx(0.05, rel=1e-3)
    assert rates[1] == rates[2] == rates[3] == pytest.approx(0.1, rel=1e-3)
    assert rates[4] == pytest.approx(0.1 * 0.7071, rel=1e-2)
    assert rates[5] == pytest.approx(0.0, abs=1e-6)


def test_a_step_lowers_the_loss_and_moves_the_average() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(8, 1)
    start = layer.weight.detach().clone()
    x, y = torch.randn(64, 8), torch.randn(64, 1)
    optimizer = Optimizer(layer.parameters(), peak_lr=0.05, seconds=1e9, warm_up_steps=1)
    step = TrainingStep(lambda: (layer(x) - y).square().mean(), optimizer)
    losses = []
    for _ in range(50):
        optimizer.tick()
        step()
        losses.append(step.loss.item())
    assert losses[-1] < 0.9 * losses[0]
    moved, averaged = (layer.weight - start).norm(), (optimizer.average[0] - start).norm()
    assert 0 < averaged < moved
    optimizer.swap_average()
    assert torch.equal(optimizer.average[0], layer.weight) is False
