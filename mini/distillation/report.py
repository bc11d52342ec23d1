"""Judge a LoRA by the oracle beside the teacher, and write the folder that holds it."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch

from mini.distillation.adapters import merge_file
from mini.distillation.progress import Progress
from mini.distillation.run import LORA_FILE, Distillation
from mini.distillation.schedule import euler_scheduler
from mini.evaluate import (
    SAMPLING_STEPS,
    Rate,
    contact_sheet,
    oracle_rates,
    sample,
    side_by_side,
)
from mini.world.oracle import Frames
from mini.world.scenes import Split, captions_of

_SHOWN = 10

TEACHER = "teacher"
UNTRAINED = "few steps, no LoRA"
STUDENT = "few steps, LoRA"


class Judged:
    """The videos of the same captions and noise by teacher, untrained student and student."""

    def __init__(self, run: Distillation, count: int) -> None:
        """Choose captions of the evaluation split, which nothing is trained on."""
        self._run = run
        self.texts = captions_of(Split.EVALUATION, count)
        self.videos: dict[str, list[Frames]] = {}

    @staticmethod
    def passes(run: Distillation, count: int) -> int:
        """Return the passes of one sample that judging takes, without the VAE's work."""
        return count * (2 * SAMPLING_STEPS + 2 * run.settings.student_steps)

    def generate(self, progress: Progress) -> None:
        """Make the videos; the pipeline's transformer then holds the LoRA."""
        run, settings = self._run, self._run.settings
        few = {"steps": settings.student_steps, "guidance_scale": 1.0}
        self._sample(TEACHER, progress, {"guidance_scale": settings.guidance_scale})
        scheduler = euler_scheduler(run.pipeline.scheduler.config)
        run.pipeline.register_modules(scheduler=scheduler)
        self._sample(UNTRAINED, progress, few)
        merge_file(run.pipeline.transformer, run.lora)
        self._sample(STUDENT, progress, few)

    def _sample(self, name: str, progress: Progress, options: dict[str, Any]) -> None:
        each = options.get("steps", SAMPLING_STEPS) * (2 if options["guidance_scale"] > 1 else 1)
        self.videos[name] = []
        batch = min(self._run.settings.batch, 64)  # the VAE decodes a batch at once, in FP32
        for video in sample(
            self._run.pipeline, self.texts, range(len(self.texts)), batch, **options
        ):
            self.videos[name].append(video)
            progress.advance(f"judging {name}", each)

    def rates(self) -> dict[str, dict[str, Rate]]:
        """Return by sampler what its videos show of the captions."""
        return {name: oracle_rates(videos, self.texts) for name, videos in self.videos.items()}

    def psnr_db(self) -> float:
        """Return the mean PSNR of the student's videos against the teacher's, at most 100."""
        found = []
        for video, reference in zip(self.videos[STUDENT], self.videos[TEACHER], strict=True):
            error = np.square(video.astype(np.float64) - reference).mean()
            found.append(min(100.0, 10 * np.log10(255**2 / max(error, 1e-9))))
        return float(np.mean(found))


def write_result(out: Path, run: Distillation, judged: Judged, began: float) -> None:
    """Write LoRA, card, figures and contact sheet into a new folder, which is there whole or not.

    Args:
        began: of `time.monotonic`, when this process began the run.
    """
    rates = judged.rates()
    figures = {
        "settings": asdict(run.settings),
        "transformer_sha256": run.fingerprint,
        "device": torch.cuda.get_device_name() if run.device.type == "cuda" else "cpu",
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
        "seconds_of_this_process": round(time.monotonic() - began, 1),
        "errors_of_rounds": run.errors,
        "losses": run.training.losses,
        "captions": len(judged.texts),
        "oracle": {
            name: {part: {"right": r.right, "total": r.total} for part, r in parts.items()}
            for name, parts in rates.items()
        },
        "psnr_db_student_teacher": judged.psnr_db(),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as made:
        part = Path(made) / "part"
        part.mkdir()  # with the rights of any folder, which a temporary one has not
        shutil.copyfile(run.lora, part / LORA_FILE)
        (part / "distill.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
        _sheet(judged).save(part / "contact-sheet.png", optimize=True)
        (part / "README.md").write_text(_card(run, figures, rates), encoding="utf-8")
        part.rename(out)


def _sheet(judged: Judged) -> Any:
    return side_by_side(
        [
            contact_sheet(name, list(zip(judged.texts, judged.videos[name], strict=True))[:_SHOWN])
            for name in (TEACHER, STUDENT)
        ]
    )


def _card(run: Distillation, figures: dict[str, Any], rates: dict[str, dict[str, Rate]]) -> str:
    settings = run.settings
    steps = settings.student_steps
    sigmas = ", ".join(f"{sigma:.3g}" for sigma in run.schedule.sigmas.tolist())
    return f"""# A LoRA of the miniature for {steps} steps without guidance

Rank {settings.rank} on every linear of the blocks, FP16, to be merged with scale 1 into the
transformer whose files have the SHA-256 `{run.fingerprint[:16]}…`. Sample with guidance 1 and
Euler's method at sigmas {sigmas}, as a worker's mode with `scheduler = "euler"` does:

```python
class EvenEuler(FlowMatchEulerDiscreteScheduler):
    def set_timesteps(self, num_inference_steps, device=None):
        levels = numpy.linspace(1, 0, num_inference_steps, endpoint=False)
        super().set_timesteps(sigmas=levels, device=device)


scheduler = EvenEuler(shift=pipeline.scheduler.config.flow_shift)
pipeline.register_modules(scheduler=scheduler)
pipeline.load_lora_weights("FOLDER")
pipeline(prompt, num_inference_steps={steps}, guidance_scale=1.0, max_sequence_length=64)
```

Made by `python -m mini distill` on {figures["device"]}: {settings.steps:,} steps of batch
{settings.batch}, on {settings.rounds} rounds of {settings.trajectories:,} trajectories of the
teacher with guidance {settings.guidance_scale:g}. [distill.json](distill.json) has all settings
and figures.

## Oracle
Of {figures["captions"]} captions of the evaluation split, with the same noise; Wilson intervals of
95 %. The teacher takes {SAMPLING_STEPS} steps with guidance. PSNR of the student's videos against
the teacher's: {figures["psnr_db_student_teacher"]:.1f} dB.

{_table(rates)}

![The first {_SHOWN} captions, the teacher left and the student right](contact-sheet.png)

## Training
The student's error in each segment, as a share of the velocity's square, on trajectories that it
had not seen. The first round follows the teacher, later ones the student.

{_errors(run.errors)}
"""


def _table(rates: dict[str, dict[str, Rate]]) -> str:
    lines = [f"| shown as the caption says | {' | '.join(rates)} | LoRA - teacher |"]
    lines.append("|---" * (len(rates) + 2) + "|")
    for part, teacher in rates[TEACHER].items():
        cells = [_cell(each[part]) for each in rates.values()]
        difference = 100 * (rates[STUDENT][part].share - teacher.share)
        lines.append(f"| {part}, of {teacher.total} | {' | '.join(cells)} | {difference:+.1f} |")
    return "\n".join(lines)


def _cell(rate: Rate) -> str:
    low, high = rate.interval
    return f"{100 * rate.share:.1f} % ({100 * low:.1f} to {100 * high:.1f})"


def _errors(errors: Sequence[Sequence[float]]) -> str:
    segments = range(1, len(errors[0]) + 1)
    lines = ["| round | " + " | ".join(f"segment {number}" for number in segments) + " |"]
    lines.append("|---" * (len(errors[0]) + 1) + "|")
    for number, row in enumerate(errors, 1):
        lines.append(f"| {number} | " + " | ".join(f"{each:.4f}" for each in row) + " |")
    return "\n".join(lines)
