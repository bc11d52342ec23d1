"""The whole training of the miniature: VAE, then transformer and text encoder, resumable.

The work folder keeps the VAE when it is done and the denoiser at every check; a later call goes on
from there. The result is a diffusers folder with settings and training log beside it. One GPU,
about half an hour; on a CPU the same code runs without graph capture, which is what the tests do.
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
from mini.training.train_denoiser import DenoiserTraining, initialise, look_both_ways
from mini.training.train_vae import reconstruction_psnr_db, train_vae
from mini.world.scenes import Split, captions_of

logger = logging.getLogger(__name__)

TOKENIZER_CAPTIONS = 20_000


class TrainingRun:
    """One training run in a work folder; `vae()` then `denoiser()` then `save()`."""

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
        look_both_ways(self.model.text_encoder)
        for part in (self.model.text_encoder, self.model.transformer, self.model.vae):
            part.to(self.device)
        self._began = time.monotonic()

    def _tokenizer(self) -> PreTrainedTokenizerFast:
        """Trained once a work folder: another version of tokenizers breaks ties another way."""
        folder = self.work / "tokenizer"
        if not (folder / "tokenizer.json").exists():
            build_tokenizer(captions_of(Split.TRAIN, TOKENIZER_CAPTIONS)).save_pretrained(folder)
        return PreTrainedTokenizerFast.from_pretrained(folder)

    def report(self, stage: str, figures: dict[str, float]) -> None:
        """Log figures and append them to the work folder's log."""
        rounded = {name: round(value, 5) for name, value in figures.items()}
        line = {"stage": stage, "elapsed_s": round(time.monotonic() - self._began, 1), **rounded}
        logger.info("%s", json.dumps(line))
        with (self.work / "log.jsonl").open("a") as log:
            log.write(json.dumps(line) + "\n")

    def vae(self) -> None:
        """Train the VAE, or what is left of its time if the work folder has one."""
        folder, settings = self.work / "vae", self.settings.vae
        trained_s = folder / "trained_s.json"
        done = json.loads(trained_s.read_text()) if trained_s.exists() else 0.0
        if done:
            trained = AutoencoderKLWan.from_pretrained(folder)
            self.model.vae.load_state_dict(trained.state_dict())
            statistics = {k: trained.config[k] for k in ("latents_mean", "latents_std")}
            self.model.vae.register_to_config(**statistics)
        if done >= settings.clip_s:
            return
        # What was made with the VAE as it was is of no use any more.
        for stale in ("corpus.pt", "denoiser.pt"):
            (self.work / stale).unlink(missing_ok=True)
        train_vae(self.model.vae, settings, self.report, done_clip_s=done)
        self.model.vae.save_pretrained(folder)
        trained_s.write_text(json.dumps(settings.clip_s))
        psnr = reconstruction_psnr_db(
            self.model.vae, Split.CALIBRATION, settings.check_clips, seed=0
        )
        figures = {"psnr_db_mean": psnr.mean().item(), "psnr_db_min": psnr.min().item()}
        self.report("vae reconstruction", figures)

    def denoiser(self, until: float = 1.0) -> float:
        """Train transformer and text encoder to a share of their time; returns the share."""
        began = time.monotonic()
        settings = self.settings.denoiser
        self.model.vae.requires_grad_(False)
        corpus = self._corpus()
        self.report("corpus", {"scenes": settings.corpus, "seconds": time.monotonic() - began})
        training = DenoiserTraining(self.model, corpus, settings)
        training.prepare()
        self._restore(training)
        progress = min(1.0, training.optimizer.spent_s / settings.seconds)
        while progress < until:
            progress = training.run(min(until, progress + 1 / settings.checks), self.report)
            self._keep(training)
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
        # Not the batches and the noise of the first part again.
        torch.manual_seed(self.settings.denoiser.seed + training.optimizer.steps)

    def _keep(self, training: DenoiserTraining) -> None:
        state = {
            "transformer": self.model.transformer.state_dict(),
            "text_encoder": self.model.text_encoder.state_dict(),
            "optimizer": training.optimizer.state(),
        }
        unfinished = self.work / "denoiser.pt.part"
        torch.save(state, unfinished)
        unfinished.replace(self.work / "denoiser.pt")

    def _corpus(self) -> Corpus:
        """The encoded training scenes, kept in the work folder for a run that goes on."""
        kept, settings = self.work / "corpus.pt", self.settings.denoiser
        if kept.exists():
            corpus = Corpus(**torch.load(kept, map_location=self.device, weights_only=True))
            if len(corpus.latents) == settings.corpus:
                return corpus
        corpus = build_corpus(
            self.model.vae,
            self.model.tokenizer,
            settings.corpus,
            settings.seed,
            settings.pair_share,
        )
        torch.save(asdict(corpus), kept)
        return corpus

    def check(self, progress: float) -> None:
        """Oracle rates on captions of the calibration split, with the averaged weights."""
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
        """The miniature as it is stored: transformer and text encoder in BF16, VAE in FP16."""
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
        """Write the diffusers folder: BF16 transformer and text encoder, FP16 VAE."""
        self._stored_copy().pipeline().save_pretrained(folder)
        settings = json.dumps(asdict(self.settings), indent=2)
        (folder / "training.json").write_text(settings + "\n")
        shutil.copyfile(self.work / "log.jsonl", folder / "training-log.jsonl")
