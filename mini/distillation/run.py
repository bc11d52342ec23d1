"""Distil the miniature: record and train in turns, then keep the LoRA; a later run goes on.

The method is regression in segments, with the states of later rounds from the student itself
(docs/decisions/040). The work folder holds `settings.json`, the recorded trajectories and the
state of the training.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import random
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from diffusers import WanPipeline
from torch import Tensor

from mini.architecture import LATENT_CHANNELS, LATENT_SHAPE, TEXT_TOKENS
from mini.distillation.progress import Progress
from mini.distillation.schedule import Schedule
from mini.distillation.settings import DistillError, DistillSettings
from mini.distillation.training import PASSES_OF_A_STEP, Training
from mini.distillation.trajectories import Recorder, Trajectories
from mini.evaluate import load_pipeline
from mini.training.autocast import multiplies_bf16
from mini.world.scenes import Split, captions_of, parse_caption, split_of

logger = logging.getLogger(__name__)

MOST_BYTES = 1_900_000
"""Of the LoRA's tensors: names and shapes take almost 0.1 MB of a file's 2 MB."""
LORA_FILE = "pytorch_lora_weights.safetensors"
_KEEP_EVERY = 250


class Distillation:
    """One run over a work folder: `run`, then read `lora`.

    Attributes:
        pipeline: the model, as a worker runs it.
        schedule: of the student's steps.
        lora: the trained LoRA, in the work folder.
        fingerprint: SHA-256 of the files of the transformer's weights.
        errors: for each round, the student's error in each segment when it was recorded.
    """

    def __init__(
        self,
        model: Path,
        work: Path,
        settings: DistillSettings,
        device: str,
        captions: Sequence[str] | None = None,
    ) -> None:
        """Load the model, and make the work folder or find it.

        Args:
            captions: what trajectories show, over and over; None draws different ones of the
                training split.

        Raises:
            DistillError: the model is no miniature, the LoRA would be too large, a caption is not
                of the world or is one of the evaluation, or the folder is of another run.
        """
        if captions is None:
            count = settings.rounds * settings.trajectories
            captions = captions_of(Split.TRAIN, count, settings.seed)
        else:
            check_captions(captions)
        self.settings, self.captions, self.work = settings, captions, work
        self.pipeline = _load(model, device)
        self.device = self.pipeline.transformer.device
        transformer = self.pipeline.transformer.requires_grad_(False)
        if not multiplies_bf16(self.device):  # it would emulate BF16
            transformer = copy.deepcopy(transformer).float()
        self.schedule = Schedule(
            self.pipeline.scheduler.config, settings.student_steps, self.device
        )
        self.training = Training(transformer, self.schedule, settings)
        if (size := self.training.adapters.stored_bytes()) > MOST_BYTES:
            raise DistillError(
                f"a LoRA of rank {settings.rank} for {model} has {size:,} bytes, and at most "
                f"{MOST_BYTES:,} fit: choose a lower --rank, or the miniature"
            )
        self._recorder = Recorder(
            transformer,
            self.schedule,
            settings.guidance_scale,
            settings.teacher_steps,
            self._embed([""]),
        )
        self.lora = work / LORA_FILE
        self.errors: list[list[float]] = []
        self.fingerprint = _fingerprint(model)
        self._claim()

    @property
    def passes(self) -> tuple[int, int]:
        """Return the passes of one sample that recording and training take."""
        settings = self.settings
        recording = settings.rounds * settings.trajectories * self._recorder.passes
        return recording, settings.steps * settings.batch * PASSES_OF_A_STEP

    def run(self, progress: Progress) -> None:
        """Record and train what an earlier run has not, and write the LoRA."""
        state, settings = self.work / "state.pt", self.settings
        if state.exists():
            self.training.restore(state)
            progress.skip(self.training.done * settings.batch * PASSES_OF_A_STEP)
        recorded: list[Trajectories] = []
        for number in range(settings.rounds):
            recorded.append(self._round(number, progress))
            self.errors.append(recorded[-1].errors.mean(0).tolist())
            logger.info(
                "round %d, error of the student's velocity in each segment: %s",
                number + 1,
                ", ".join(f"{error:.4f}" for error in self.errors[-1]),
            )
            self._train(Trajectories.join(recorded), settings.first_step(number + 1), progress)
        self.training.adapters.save(self.lora)

    def _round(self, number: int, progress: Progress) -> Trajectories:
        """Record a round, or read what an earlier run has recorded of it."""
        settings, parts = self.settings, []
        student = None
        for start in range(0, settings.trajectories, settings.batch):
            count = min(settings.batch, settings.trajectories - start)
            file = self.work / f"round-{number}-{start:06d}.safetensors"
            if file.exists():
                progress.skip(count * self._recorder.passes)
                parts.append(Trajectories.load(file, self.device))
                continue
            if student is None:
                with torch.no_grad():
                    student = self.training.adapters.merged()
            first = number * settings.trajectories + start
            texts = [self.captions[k % len(self.captions)] for k in range(first, first + count)]
            part = self._recorder.record(
                self._noise(first, count), self._embed(texts), student, follow_student=number > 0
            )
            part.save(file)
            parts.append(part)
            progress.advance(f"recording round {number + 1}", count * self._recorder.passes)
        return Trajectories.join(parts)

    def _train(self, recorded: Trajectories, until: int, progress: Progress) -> None:
        training = self.training
        while training.done < until:
            training.step(recorded)
            progress.advance("training", self.settings.batch * PASSES_OF_A_STEP)
            # At the end of a round, too: the next one is recorded by this very student.
            if training.done % _KEEP_EVERY == 0 or training.done == until:
                training.save(self.work / "state.pt")
                step, loss = training.losses[-1]
                logger.info("step %d of %d: loss %.5f", step, self.settings.steps, loss)

    def _noise(self, first: int, count: int) -> Tensor:
        """Draw [count, C, F, H, W] for trajectories from number `first` on."""
        seed = random.Random(f"distillation {self.settings.seed} {first}").getrandbits(32)
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(count, *LATENT_SHAPE, generator=generator).to(self.device)

    def _embed(self, texts: Sequence[str]) -> Tensor:
        """Embed captions as a worker does, [N, T, D]."""
        with torch.no_grad():
            embedded, _ = self.pipeline.encode_prompt(
                list(texts), do_classifier_free_guidance=False, max_sequence_length=TEXT_TOKENS
            )
        return embedded  # type: ignore[no-any-return]

    def _claim(self) -> None:
        """Make the work folder, or check that it is of the same run."""
        captions = hashlib.sha256("\n".join(self.captions).encode()).hexdigest()
        own = {**asdict(self.settings), "captions": captions, "transformer": self.fingerprint}
        file = self.work / "settings.json"
        if not file.exists():
            self.work.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(own, indent=2) + "\n", encoding="utf-8")
        found = json.loads(file.read_text(encoding="utf-8"))
        if differing := sorted(key for key in own if own[key] != found.get(key)):
            raise DistillError(
                f"{self.work} is of a run with other settings ({', '.join(differing)}): name "
                "another folder with --work, or go on with those in its settings.json"
            )


def check_captions(captions: Sequence[str]) -> None:
    """Refuse captions that cannot be trained on.

    Raises:
        DistillError: there are none, or names the first that is unknown or held out.
    """
    if not captions:
        raise DistillError("there are no captions: write one a line, or leave --captions out")
    for caption in captions:
        try:
            scene = parse_caption(caption)
        except ValueError as error:
            raise DistillError(f"{error}: correct it in --captions") from error
        if split_of(scene) is Split.EVALUATION:
            raise DistillError(
                f"{caption!r} shows a scene of the evaluation: take it out of --captions"
            )


def _fingerprint(model: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted((model / "transformer").glob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _load(model: Path, device: str) -> WanPipeline:
    if device == "cuda" and not torch.cuda.is_available():
        raise DistillError("there is no GPU that torch can use: run with --device cpu")
    index = model / "model_index.json"
    if not index.exists() or json.loads(index.read_text())["_class_name"] != "WanPipeline":
        raise DistillError(f"{model} is no folder of a WanPipeline: name models/wan-mini, or alike")
    pipeline = load_pipeline(model, device)
    pipeline.set_progress_bar_config(disable=True)
    config = pipeline.scheduler.config
    if pipeline.transformer.config.in_channels != LATENT_CHANNELS or not config.get(
        "use_flow_sigmas"
    ):
        raise DistillError(
            f"{model} is not like the miniature ({LATENT_CHANNELS} latent channels, UniPC with "
            "flow sigmas): train one with `python -m mini train`"
        )
    return pipeline
