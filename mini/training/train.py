"""Train the miniature: first the VAE, then transformer and text encoder. Training is resumable.

The work folder stores the VAE when it is finished and the denoiser at every check; a later call
continues from there. The result is a diffusers folder that also contains settings and training log.
It takes about half an hour on one GPU. On a CPU the same code runs without graph capture, as in the
tests.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from dataclasses import asdict
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from transformers import PreTrainedTokenizerFast

from mini.architecture import (
    Miniature,
    build_text_encoder,
    build_tokenizer,
    build_transformer,
    build_vae,
)
from mini.evaluate import load_pipeline, oracle_rates, sample
from mini.training.dataset import Corpus, build_corpus
from mini.training.settings import TrainingSettings
from mini.training.train_denoiser import DenoiserTraining, bias_heads_by_direction, initialise
from mini.training.train_vae import reconstruction_psnr_db, train_vae
from mini.world.scenes import Split, captions_of

logger = logging.getLogger(__name__)

TOKENIZER_CAPTIONS = 20_000


class TrainingRun:
    """A training run in a work folder: call `train_vae`, `train_denoiser`, then `save`."""

    def __init__(self, work: Path, settings: TrainingSettings, device: str) -> None:
        self.work, self.settings, self.device = work, settings, torch.device(device)
        work.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(settings.denoiser.seed)
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
        self.model = Miniature(
            self._tokenizer(), build_text_encoder(), build_transformer(), build_vae()
        )
        initialise(self.model.transformer)
        bias_heads_by_direction(self.model.text_encoder)
        for module in (self.model.text_encoder, self.model.transformer, self.model.vae):
            module.to(self.device)
        self._started_at = time.monotonic()

    def _tokenizer(self) -> PreTrainedTokenizerFast:
        """Load the tokenizer, or train it if the work folder has none.

        It is trained only once, because another version of tokenizers may break ties differently.
        """
        folder = self.work / "tokenizer"
        if not (folder / "tokenizer.json").exists():
            build_tokenizer(captions_of(Split.TRAIN, TOKENIZER_CAPTIONS)).save_pretrained(folder)
        return PreTrainedTokenizerFast.from_pretrained(folder)

    def report(self, stage: str, figures: dict[str, float]) -> None:
        """Log figures and append them to the work folder's log."""
        rounded = {name: round(value, 5) for name, value in figures.items()}
        line = {
            "stage": stage,
            "elapsed_s": round(time.monotonic() - self._started_at, 1),
            **rounded,
        }
        logger.info("%s", json.dumps(line))
        with (self.work / "log.jsonl").open("a") as log:
            log.write(json.dumps(line) + "\n")

    def train_vae(self) -> None:
        """Train the VAE; a VAE in the work folder is trained for the remaining time only."""
        folder, settings = self.work / "vae", self.settings.vae
        trained_s = folder / "trained_s.json"
        done_s = json.loads(trained_s.read_text()) if trained_s.exists() else 0.0
        if done_s:
            trained = AutoencoderKLWan.from_pretrained(folder)
            self.model.vae.load_state_dict(trained.state_dict())
            statistics = {k: trained.config[k] for k in ("latents_mean", "latents_std")}
            self.model.vae.register_to_config(**statistics)
        if done_s >= settings.clip_s:
            return
        # These files depend on the VAE before further training, so they are no longer valid.
        for stale in ("corpus.pt", "denoiser.pt"):
            (self.work / stale).unlink(missing_ok=True)
        train_vae(self.model.vae, settings, self.report, done_clip_s=done_s)
        self.model.vae.save_pretrained(folder)
        trained_s.write_text(json.dumps(settings.clip_s))
        psnr = reconstruction_psnr_db(
            self.model.vae, Split.CALIBRATION, settings.check_clips, seed=0
        )
        figures = {"psnr_db_mean": psnr.mean().item(), "psnr_db_min": psnr.min().item()}
        self.report("vae reconstruction", figures)

    def train_denoiser(self, until: float = 1.0) -> float:
        """Train transformer and text encoder up to a share of their time; return the share."""
        started_at = time.monotonic()
        settings = self.settings.denoiser
        self.model.vae.requires_grad_(False)
        corpus = self._corpus()
        self.report("corpus", {"scenes": settings.corpus, "seconds": time.monotonic() - started_at})
        training = DenoiserTraining(self.model, corpus, settings)
        training.prepare()
        self._restore(training)
        progress = min(1.0, training.optimizer.spent_s / settings.seconds)
        while progress < until:
            progress = training.run(min(until, progress + 1 / settings.checks), self.report)
            self._save_checkpoint(training)
            training.optimizer.swap_average()
            self.check(progress)
            training.optimizer.swap_average()
        training.optimizer.swap_average()
        return progress

    def _restore(self, training: DenoiserTraining) -> None:
        checkpoint = self.work / "denoiser.pt"
        if not checkpoint.exists():
            return
        state = torch.load(checkpoint, map_location=self.device, weights_only=True)
        self.model.transformer.load_state_dict(state["transformer"])
        self.model.text_encoder.load_state_dict(state["text_encoder"])
        training.optimizer.restore(state["optimizer"])
        # A new seed, so that the first batches and noises do not repeat.
        torch.manual_seed(self.settings.denoiser.seed + training.optimizer.steps)

    def _save_checkpoint(self, training: DenoiserTraining) -> None:
        state = {
            "transformer": self.model.transformer.state_dict(),
            "text_encoder": self.model.text_encoder.state_dict(),
            "optimizer": training.optimizer.state(),
        }
        unfinished = self.work / "denoiser.pt.part"
        torch.save(state, unfinished)
        unfinished.replace(self.work / "denoiser.pt")

    def _corpus(self) -> Corpus:
        """Load the encoded training scenes from the work folder, or build and store them."""
        file, settings = self.work / "corpus.pt", self.settings.denoiser
        if file.exists():
            corpus = Corpus(**torch.load(file, map_location=self.device, weights_only=True))
            if len(corpus.latents) == settings.corpus:
                return corpus
        corpus = build_corpus(
            self.model.vae,
            self.model.tokenizer,
            settings.corpus,
            settings.seed,
            settings.pair_share,
        )
        torch.save(asdict(corpus), file)
        return corpus

    def check(self, progress: float) -> None:
        """Report oracle rates on captions of the calibration split, with the averaged weights."""
        count = self.settings.denoiser.check_prompts
        if not count:
            return
        texts = captions_of(Split.CALIBRATION, count, seed=1)
        self.save(self.work / "check")
        pipeline = load_pipeline(self.work / "check", str(self.device))
        videos = list(sample(pipeline, texts, range(count), batch=32))
        rates = oracle_rates(videos, texts)
        self.report("check", {"progress": progress, **{k: r.share for k, r in rates.items()}})

    def _stored_copy(self) -> Miniature:
        """Copy the miniature in its stored form: transformer and text encoder BF16, VAE FP16."""
        copy = Miniature(
            self.model.tokenizer, build_text_encoder(), build_transformer(), build_vae()
        )
        copy.vae.register_to_config(
            latents_mean=self.model.vae.config.latents_mean,
            latents_std=self.model.vae.config.latents_std,
        )
        copy.transformer.load_state_dict(self.model.transformer.state_dict())
        copy.text_encoder.load_state_dict(self.model.text_encoder.state_dict())
        copy.vae.load_state_dict(self.model.vae.state_dict())
        copy.transformer.bfloat16()
        copy.text_encoder.bfloat16()
        copy.vae.half()
        return copy

    def save(self, folder: Path) -> None:
        """Write the diffusers folder, with settings and training log."""
        self._stored_copy().pipeline().save_pretrained(folder)
        settings = json.dumps(asdict(self.settings), indent=2)
        (folder / "training.json").write_text(settings + "\n")
        shutil.copyfile(self.work / "log.jsonl", folder / "training-log.jsonl")
