"""Training at a tiny size: it runs, resumes, and saves its weights; quality is not tested."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline
from torch import nn
from transformers import UMT5EncoderModel

from mini.architecture import build_text_encoder, build_tokenizer
from mini.training.autocast import mixed_precision, multiplies_bf16
from mini.training.dataset import scenes_of, tokenize
from mini.training.optimizer import Optimizer, TrainingStep
from mini.training.settings import DenoiserSettings, TrainingSettings, VaeSettings
from mini.training.train import TrainingRun
from mini.training.train_denoiser import bias_heads_by_direction, draw_sigma, encode_text
from mini.world.scenes import Split, captions_of

# Under autocast torch warns that BF16 activations meet FP32 norm weights, which is intended.
pytestmark = pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")

TINY = TrainingSettings(
    vae=VaeSettings(pool=2, image_s=0.1, clip_s=0.1, image_batch=2, clip_batch=1, check_clips=1),
    denoiser=DenoiserSettings(
        seconds=1.0, corpus=4, batch=1, long_text_share=0.5, checks=2, check_prompts=0
    ),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TrainingRun:
    """Return a run with a finished VAE and a denoiser stopped halfway."""
    work = tmp_path_factory.mktemp("training")
    run = TrainingRun(work, TINY, "cpu")
    run.train_vae()
    assert run.train_denoiser(until=0.5) >= 0.5
    return run


def logged(run: TrainingRun, stage: str) -> list[dict[str, float]]:
    """Return the figures of one stage in the work folder's log."""
    lines = [json.loads(line) for line in (run.work / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["stage"] == stage]


def test_a_later_run_continues_and_saves_the_average(run: TrainingRun, tmp_path: Path) -> None:
    before = logged(run, "denoiser")[-1]
    corpus = (run.work / "corpus.pt").stat().st_mtime_ns
    spent_s = torch.load(run.work / "denoiser.pt", weights_only=True)["optimizer"]["spent_s"]
    longer = replace(TINY.denoiser, seconds=spent_s + 0.5)
    later = TrainingRun(run.work, replace(TINY, denoiser=longer), "cpu")
    later.train_vae()
    for name, tensor in run.model.vae.state_dict().items():
        assert torch.equal(tensor, later.model.vae.state_dict()[name]), name
    assert later.train_denoiser() == 1.0
    after = logged(run, "denoiser")[-1]
    assert after["steps"] > before["steps"]
    assert after["spent_s"] > spent_s >= 0.5
    assert len(logged(run, "vae 17-frame")) == 1
    assert (run.work / "corpus.pt").stat().st_mtime_ns == corpus

    later.save(tmp_path / "model")
    state = torch.load(run.work / "denoiser.pt", weights_only=True)
    count = len(list(later.model.transformer.parameters()))
    averages = state["optimizer"]["average"][:count]
    pipeline = WanPipeline.from_pretrained(tmp_path / "model")
    names = [name for name, _ in later.model.transformer.named_parameters()]
    saved = pipeline.transformer.state_dict()
    for name, average in zip(names, averages, strict=True):
        assert torch.equal(saved[name], average.bfloat16().float()), name
    raw = state["transformer"]["blocks.0.attn1.to_q.weight"]
    assert not torch.equal(saved["blocks.0.attn1.to_q.weight"], raw.bfloat16().float())
    assert json.loads((tmp_path / "model" / "training.json").read_text())["vae"]["pool"] == 2
    assert (tmp_path / "model" / "training-log.jsonl").read_text().count("denoiser") >= 2


def test_a_vae_that_is_trained_on_makes_encoded_scenes_stale(tmp_path: Path) -> None:
    (tmp_path / "corpus.pt").touch()
    (tmp_path / "denoiser.pt").touch()
    TrainingRun(tmp_path, TINY, "cpu").train_vae()
    assert not (tmp_path / "corpus.pt").exists()
    assert not (tmp_path / "denoiser.pt").exists()


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


def test_a_share_of_the_noise_levels_is_where_positions_are_decided() -> None:
    torch.manual_seed(0)
    usual = draw_sigma(20_000, DenoiserSettings(noisy_share=0.0), torch.device("cpu"))
    assert 0.02 < (usual > 0.95).float().mean() < 0.04
    noisy = draw_sigma(
        20_000, DenoiserSettings(noisy_share=1.0, noisy_from=0.9), torch.device("cpu")
    )
    assert 0.9 <= noisy.min() < 0.901
    assert 0.999 < noisy.max() <= 1.0
    assert noisy.mean() == pytest.approx(0.95, abs=0.001)
    mixed = draw_sigma(
        20_000, DenoiserSettings(noisy_share=0.5, noisy_from=0.9), torch.device("cpu")
    )
    expected = 0.5 * (1 + (usual >= 0.9).float().mean())
    assert (mixed >= 0.9).float().mean() == pytest.approx(float(expected), abs=0.02)


def test_pairs_are_as_frequent_as_requested() -> None:
    assert all(s.relation for s in scenes_of(Split.TRAIN, 20, seed=1, pair_share=1.0))
    assert not any(s.relation for s in scenes_of(Split.TRAIN, 20, seed=1, pair_share=0.0))


def test_a_new_text_encoder_distinguishes_before_from_after(run: TrainingRun) -> None:
    tokens = tokenize(
        run.model.tokenizer,
        [
            "a small red circle above a small blue circle both rising on a black background",
            "a small blue circle above a small red circle both rising on a black background",
        ],
    )
    red = run.model.tokenizer.convert_tokens_to_ids("Ġred")

    def change(encoder: UMT5EncoderModel) -> float:
        """Return the relative change of the embedding of "red" if the other thing comes first."""
        with torch.no_grad():
            embedded = encode_text(encoder, tokens)[tokens == red]
        return float((embedded[0] - embedded[1]).norm() / embedded[0].norm())

    torch.manual_seed(0)
    encoder = build_text_encoder()
    before = change(encoder)
    bias_heads_by_direction(encoder)
    assert change(encoder) > 2 * before


def test_the_tokenizer_of_a_work_folder_is_used_again(tmp_path: Path) -> None:
    stored = build_tokenizer(captions_of(Split.TRAIN, 20))
    stored.save_pretrained(tmp_path / "tokenizer")
    assert TrainingRun(tmp_path, TINY, "cpu").model.tokenizer.get_vocab() == stored.get_vocab()


def test_a_cpu_without_bf16_instructions_computes_in_fp32() -> None:
    cpu = torch.device("cpu")
    assert multiplies_bf16(torch.device("cuda"))
    with mixed_precision(cpu):
        out = nn.Linear(4, 4)(torch.ones(1, 4))
    assert out.dtype == (torch.bfloat16 if multiplies_bf16(cpu) else torch.float32)


def test_the_learning_rate_depends_on_elapsed_time() -> None:
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


def test_a_step_lowers_the_loss_and_the_average_follows() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(8, 1)
    x, y = torch.randn(64, 8), torch.randn(64, 1)
    optimizer = Optimizer(layer.parameters(), peak_lr=0.05, seconds=1e9, warm_up_steps=1)
    step = TrainingStep(lambda: (layer(x) - y).square().mean(), optimizer)
    losses = []
    for _ in range(50):
        optimizer.tick()
        step()
        losses.append(step.loss.item())
    assert losses[-1] < 0.9 * losses[0]
    averaged, trained = optimizer.average[0].clone(), layer.weight.detach().clone()
    # After 50 steps the average reaches back about 5, not to the random start.
    assert (averaged - trained).norm() < 0.2 * trained.norm()
    assert not torch.equal(averaged, trained)
    optimizer.swap_average()
    assert torch.equal(layer.weight, averaged)
    assert torch.equal(optimizer.average[0], trained)
    assert not optimizer.average[0].requires_grad


def test_a_restored_optimizer_continues_with_its_own_learning_rate() -> None:
    layer = nn.Linear(4, 1)
    first = Optimizer(layer.parameters(), peak_lr=0.1, seconds=1e9, warm_up_steps=1)
    TrainingStep(lambda: layer(torch.ones(1, 4)).square().sum(), first)()
    second = Optimizer(layer.parameters(), peak_lr=0.1, seconds=1e9, warm_up_steps=1)
    second.restore(first.state())
    assert all(group["lr"] is second.lr for group in second.adam.param_groups)
    before = layer.weight.detach().clone()
    second.tick()
    TrainingStep(lambda: layer(torch.ones(1, 4)).square().sum(), second)()
    assert not torch.equal(layer.weight, before)


def test_moments_are_restored_in_place_for_a_captured_step() -> None:
    layer = nn.Linear(4, 1)
    optimizer = Optimizer(layer.parameters(), peak_lr=0.1, seconds=1e9, warm_up_steps=1)
    step = TrainingStep(lambda: layer(torch.ones(1, 4)).square().sum(), optimizer)
    optimizer.tick()
    step()
    saved = copy.deepcopy(optimizer.state())
    used = optimizer.adam.state[layer.weight]["exp_avg"]
    expected = used.clone()
    step()
    assert not torch.equal(used, expected)
    optimizer.restore(saved)
    assert optimizer.adam.state[layer.weight]["exp_avg"] is used
    assert torch.equal(used, expected)
