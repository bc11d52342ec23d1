"""Judge by VBench, the real package, in a Python environment of its own.

Its dependencies do not go together with this project's, so it is run by another interpreter. It
would download weights that it lacks; therefore every file is looked for first, and a missing one is
named. Nothing is downloaded.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from quant.errors import StudyError
from quant.studies.evaluation.judges.interface import Needs
from quant.studies.evaluation.video_files import Video

PAPER_DIMENSIONS = (
    "imaging_quality",
    "aesthetic_quality",
    "overall_consistency",
    "subject_consistency",
    "motion_smoothness",
)
"""What the paper most likely scored by: its text was not to be had, only summaries."""

FILES = {
    "temporal_flickering": (),
    "imaging_quality": ("pyiqa_model/musiq_spaq_ckpt-358bb6af.pth",),
    "aesthetic_quality": (
        "clip_model/ViT-L-14.pt",
        "aesthetic_model/emb_reader/sa_0_4_vit_l_14_linear.pth",
    ),
    "overall_consistency": (
        "ViCLIP/ViClip-InternVid-10M-FLT.pth",
        "ViCLIP/bpe_simple_vocab_16e6.txt.gz",
    ),
    "subject_consistency": (
        "dino_model/dino_vitbase16_pretrain.pth",
        "dino_model/facebookresearch_dino_main/hubconf.py",
    ),
    "background_consistency": ("clip_model/ViT-B-32.pt",),
    "motion_smoothness": ("amt_model/amt-s.pth",),
    "dynamic_degree": ("raft_model/models/raft-things.pth",),
}
"""What each dimension of VBench 0.1.5 reads from its folder of weights."""

_SHARE = {"imaging_quality": 0.01}
"""What brings a video's number to the scale of the dimension's, where VBench has two."""

_SCRIPT = """
import importlib, json, sys
request = json.load(open(sys.argv[1]))
from vbench.utils import init_submodules
name = request["dimension"]
compute = getattr(importlib.import_module("vbench." + name), "compute_" + name)
parts = init_submodules([name], local=True)[name]
_, rows = compute(request["videos"], request["device"], parts)
found = {row["video_path"]: float(row["video_results"]) for row in rows}
json.dump(found, open(request["answer"], "w"))
"""


@dataclass(frozen=True)
class VBenchDimension:
    """One dimension of VBench.

    Attributes:
        python: the interpreter that has the package.
        weights: the folder that VBench calls its cache.
    """

    dimension: str
    python: Path
    weights: Path
    device: str = "cpu"
    unit: str = ""
    higher_is_better: bool = True
    needs: Needs = "video"

    @property
    def name(self) -> str:
        """Return the name of the judge."""
        return f"vbench-{self.dimension.replace('_', '-')}"

    def check(self) -> None:
        """Check that the package and all files are there.

        Raises:
            StudyError: names what is missing.
        """
        if self.dimension not in FILES:
            raise StudyError(
                f"VBench's {self.dimension!r} is not one of those that score any prompt: "
                f"{', '.join(FILES)}"
            )
        missing = [name for name in FILES[self.dimension] if not (self.weights / name).exists()]
        if missing:
            raise StudyError(
                f"VBench's {self.dimension} needs {' and '.join(missing)} in {self.weights}, and "
                "nothing is downloaded here: put the files there, or leave the dimension out"
            )
        command = [str(self.python), "-c", "import vbench.utils"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            raise StudyError(f"cannot run {self.python}: {error.strerror or error}") from error
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no reason"])[-1]
            raise StudyError(
                f"{self.python} does not import vbench ({last}): install it there with "
                "`pip install vbench`"
            )

    def scores(self, videos: Sequence[Video], references: Sequence[Video]) -> Iterator[float]:
        """Yield the score of each video; they are judged together, as loading takes long."""
        if not videos:
            return
        with tempfile.TemporaryDirectory() as folder:
            listing, request, answer = (
                Path(folder) / name for name in ("videos.json", "request.json", "answer.json")
            )
            rows = [
                {
                    "prompt_en": each.prompt,
                    "dimension": [self.dimension],
                    "video_list": [str(each.file.resolve())],
                }
                for each in videos
            ]
            listing.write_text(json.dumps(rows), encoding="utf-8")
            asked = {
                "dimension": self.dimension,
                "videos": str(listing),
                "answer": str(answer),
                "device": self.device,
            }
            request.write_text(json.dumps(asked), encoding="utf-8")
            done = subprocess.run(
                [str(self.python), "-c", _SCRIPT, str(request)],
                capture_output=True,
                text=True,
                errors="replace",
                check=False,
                env=os.environ | {"VBENCH_CACHE_DIR": str(self.weights.resolve())},
            )
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ["no reason"])[-1]
                raise StudyError(f"VBench's {self.dimension} failed: {last}")
            found = json.loads(answer.read_text(encoding="utf-8"))
        share = _SHARE.get(self.dimension, 1.0)
        yield from (share * float(found[str(each.file.resolve())]) for each in videos)
