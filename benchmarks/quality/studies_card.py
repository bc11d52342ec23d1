"""Run the studies of the miniature that take a GPU, as far as a time limit lets them.

`python -m benchmarks.quality.studies_card --work FOLDER --keep OTHER_FOLDER`

| part | does |
|---|---|
| `points` | records 64 calibration prompts and 300 held-out ones, 20 steps, 8 points of each |
| `evaluate` | makes and judges videos in BF16 and W8A8, of the 300 with two seeds |
| `analyze` | finds the blocks that suffer, on the calibration points |
| `methods` | compares all ways to quantize on 4 points of each held-out prompt |
| `qat-points` | records what qat-grid.toml was trained and measured on |
| `qat` | trains what of that grid is missing, `docs/studies/qat-grid-rest.toml` |
| `qat-seeds` | trains with two more seeds, `docs/studies/qat-grid-seeds.toml` |
| `ends`, `middle` | compares ways to quantize with outliers in the paper's blocks, or in others |

Each is one or more ordinary `python -m quant` commands with a limit of its own, and some run at the
same time: a small model does not fill a card. When `--seconds` are over, what runs is stopped, and
the same command goes on with it. OTHER_FOLDER gets `NAME.tar.xz` of each part as soon as it ends,
and `summary.json`. With a folder of such archives as `--kept` studies go on on another machine,
where `points` and `qat-points` have to run again. `--device cpu` is a rehearsal at tiny sizes.
"""

from __future__ import annotations

import hashlib
import json
import signal
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import typer

import quant
from benchmarks import report
from benchmarks.quality.miniature import MODEL
from benchmarks.quality.study_parts import FAILED, LEFT, Part, Shop, Words
from mini.world.scenes import Split, captions_of

_GRIDS = report.ROOT / "docs" / "studies"
_TINY: Words = ("--size", "32x32", "--frames", 5, "--text-tokens", 64)
_JUDGES = (
    *("latent-sqnr", "psnr", "vmaf", "temporal-flickering", "mini.judge:oracle"),
    *("mini.judge:sharpness", "mini.judge:colour_error"),
)
_FULL_SIZE_JUDGE = "mini.judge:path_error"


@dataclass(frozen=True, slots=True)
class Extent:
    """How much is studied.

    Attributes:
        seen, held_out, trained, tested: numbers of prompts: to calibrate and analyze on, held out
            from that, to train on, and held out from training.
        sampling, training: options of `record` for the studies, and for QAT.
        video, judges: options of `evaluate`.
        methods, fewer: options of `compare-methods`, the second for subjects with outliers.
        grids: options of QAT's two parts.
        stretch: what the parts' limits are multiplied by.
    """

    seen: int
    held_out: int
    trained: int
    tested: int
    sampling: Words
    training: Words
    video: Words
    judges: tuple[str, ...]
    methods: Words
    fewer: Words
    grids: tuple[Words, Words]
    stretch: float = 1


WHOLE = Extent(
    *(64, 300, 64, 48),
    sampling=("--steps", 20, "--keep", 4, "--batch", 100),
    training=("--steps", 10, "--keep", 4, "--batch", 64),
    video=("--seeds", 2, "--batch", 100),
    judges=(*_JUDGES, _FULL_SIZE_JUDGE),
    methods=("--points-per-prompt", 4, "--batch", 256),
    fewer=("--points-per-prompt", 1, "--batch", 256),
    grids=(
        ("--grid", _GRIDS / "qat-grid-rest.toml"),
        ("--grid", _GRIDS / "qat-grid-seeds.toml"),
    ),
)

REHEARSAL = Extent(
    *(8, 9, 8, 8),
    sampling=("--steps", 4, "--keep", 2, "--batch", 4, *_TINY),
    training=("--steps", 4, "--keep", 2, "--batch", 4, *_TINY),
    video=("--seeds", 2, "--batch", 4, "--steps", 1, *_TINY),
    judges=_JUDGES,
    methods=("--points-per-prompt", 1, "--batch", 4),
    fewer=("--points-per-prompt", 1, "--batch", 4, "--methods", "hif8,int8-static"),
    grids=(
        ("--methods", "hif4", "--learning-rates", "1e-4", "--steps", 2, "--batches", 2),
        ("--methods", "hif8", "--learning-rates", "1e-4,1e-3", "--steps", 2, "--batches", 2),
    ),
    stretch=10,
)
"""On a CPU: the same commands, so small that only their going together is seen."""


@dataclass(frozen=True, slots=True)
class Card:
    """What the studies are of, and where.

    Attributes:
        scales: of the candidate that is evaluated beside BF16.
        work: gets the studies' folders, and files of prompts.
    """

    model: Path
    scales: Path
    work: Path
    device: str
    extent: Extent

    def write_prompts(self) -> None:
        """Write the files of prompts; the seeds are those of the results that are kept."""
        extent = self.extent
        for name, split, count, seed in (
            ("seen", Split.CALIBRATION, extent.seen, 0),
            ("held-out", Split.EVALUATION, extent.held_out, 0),
            ("trained", Split.CALIBRATION, extent.trained, 1),
            ("tested", Split.EVALUATION, extent.tested, 1),
        ):
            (self.work / f"{name}.txt").write_text("\n".join(captions_of(split, count, seed)))

    def identity(self) -> dict[str, str]:
        """Return what the results depend on; it is the same on another machine."""
        return {
            "model": quant.model_fingerprint(self.model),
            "set of scales": _sha256(self.scales) if self.scales.exists() else "none",
            "device": self.device,
            "extent": json.dumps(asdict(self.extent), default=_sha256),
        }

    def parts(self) -> list[Part]:
        """Return all parts, in the order in which they are best begun."""
        extent, work = self.extent, self.work
        studied: Words = ("--analysis", work / "analyze", *extent.methods)
        parts = [
            self._points("points", ("seen", "held-out"), extent.sampling, 150),
            Part("evaluate", (self._evaluation(),), 540, goes_on=False),
            Part("analyze", (self._analysis(),), 240, after=("points",)),
            Part(
                "methods",
                (self._comparison(self.model, ("seen", "held-out"), "methods", studied),),
                480,
                after=("points", "analyze"),
            ),
            self._points("qat-points", ("trained", "tested"), extent.training, 120),
            *(
                Part(name, (self._training(name, grid),), 560, after=("qat-points",))
                for name, grid in zip(("qat", "qat-seeds"), extent.grids, strict=True)
            ),
            *(self._outliers(blocks) for blocks in ("ends", "middle")),
        ]
        return [replace(part, limit_s=part.limit_s * extent.stretch) for part in parts]

    def _points(self, name: str, sets: tuple[str, ...], options: Words, limit_s: float) -> Part:
        commands = tuple(self._record(self.model, each, each, options) for each in sets)
        return Part(name, commands, limit_s, is_study=False)

    def _evaluation(self) -> Words:
        judges = tuple(word for judge in self.extent.judges for word in ("--judge", judge))
        words: Words = ("--candidate", f"w8a8={self.scales}", *self.extent.video, *judges)
        return self._quant(
            "evaluate", self.model, "evaluate", "--prompts", self.work / "held-out.txt", *words
        )

    def _analysis(self) -> Words:
        words: Words = ("--points", self.work / "seen", "--linear-points", 32, "--batch", 64)
        return self._quant("analyze", self.model, "analyze", *words)

    def _training(self, name: str, grid: Words) -> Words:
        words: Words = ("--points", self.work / "tested", "--training", self.work / "trained")
        words += ("--training-points-per-prompt", 4, "--points-per-prompt", 2, *grid)
        return self._quant("qat", self.model, name, *words)

    def _outliers(self, blocks: str) -> Part:
        """Return the part of a subject with outliers: it is made, recorded and compared."""
        subject = self.work / f"subject-{blocks}"
        sets = (f"seen-{blocks}", f"held-out-{blocks}")
        inject: Words = ("quant", "inject-outliers", "--model", self.model, "--out", subject)
        records = tuple(
            self._record(subject, prompts, points, self.extent.sampling)
            for prompts, points in zip(("seen", "held-out"), sets, strict=True)
        )
        compare = self._comparison(subject, sets, blocks, self.extent.fewer)
        commands = ((*inject, "--blocks", blocks), *records, compare)
        return Part(blocks, commands, 420)

    def _record(self, model: Path, prompts: str, points: str, options: Words) -> Words:
        file = self.work / f"{prompts}.txt"
        return self._quant("record", model, points, "--prompts", file, *options)

    def _comparison(self, model: Path, sets: tuple[str, str], name: str, options: Words) -> Words:
        seen, held_out = (self.work / each for each in sets)
        words: Words = ("--points", held_out, "--calibration", seen, *options)
        return self._quant("compare-methods", model, name, *words)

    def _quant(self, command: str, model: Path, out: str, *words: object) -> Words:
        options: Words = ("--model", model, "--device", self.device, "--out", self.work / out)
        return ("quant", command, *options, *words)


def main(  # noqa: PLR0913, PLR0917 (typer's way: the signature is the command line)
    work: Annotated[Path, typer.Option(help="Folder to make, or to go on with.")],
    keep: Annotated[Path, typer.Option(help="Folder for archives and the summary.")],
    parts: Annotated[str, typer.Option(help="Names with commas, or all.")] = "all",
    seconds: Annotated[float, typer.Option(help="When all is stopped.")] = 560,
    together: Annotated[int, typer.Option(min=1, help="Parts that run at the same time.")] = 3,
    kept: Annotated[Path | None, typer.Option(help="Archives to go on from.")] = None,
    model: Annotated[Path, typer.Option(help="Pipeline folder.")] = MODEL,
    scales: Annotated[Path | None, typer.Option(help="Default: MODEL's boundary-hif8.")] = None,
    device: Literal["cuda", "cpu"] = "cuda",
) -> None:
    """Run the chosen parts, pack what each has found; end with 1 if one failed or none began."""
    ends = time.monotonic() + seconds
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # As a shell starts what is in the background; the commands would not be stopped softly.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for folder in (work, keep):
        folder.mkdir(parents=True, exist_ok=True)
    scales = scales or model / "scales" / "boundary-hif8.safetensors"
    extent = WHOLE if device == "cuda" else REHEARSAL
    card = Card(model.resolve(), scales.resolve(), work.resolve(), device, extent)
    known = card.parts()
    chosen = {part.name for part in known} if parts == "all" else set(parts.split(","))
    if unknown := chosen - {part.name for part in known}:
        names = ", ".join(part.name for part in known)
        sys.exit(f"--parts has {', '.join(sorted(unknown))}: take some of {names}, or all")
    try:
        shop = Shop(card.work, keep.resolve(), ends, card.identity())
        if kept is not None:
            shop.unpack(kept)
    except ValueError as error:
        sys.exit(str(error))
    card.write_prompts()
    shop.run(known, chosen, together)
    if FAILED in shop.states.values():
        sys.exit(f"a part has failed: its log in {work} says why")
    if set(shop.states.values()) == {LEFT}:
        before = {name for part in known if part.name in chosen for name in part.after} - chosen
        need = f"choose {', '.join(sorted(before))}, too" if before else "give more --seconds"
        sys.exit(f"no part could begin: {need}")


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


if __name__ == "__main__":
    typer.run(main)
