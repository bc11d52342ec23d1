"""Measure the studies on a model of the 14B's shape: seconds, memory, and a kill in the middle.

`python -m benchmarks.speed.studies_14b --work FOLDER --part whole` and `--part short`

Random weights are fabricated in FOLDER. Each command runs in a process of its own, which may
allocate 80 GB of the device; how much of it and of the host's memory it takes is measured.

- `whole` has all blocks, at 832x480 and 49 frames: `record`, `analyze` for as many seconds as
  `--analyze-s` says, which end with a kill and a second start that goes on, and `calibrate`. To
  finish the analysis would take hours on one card; its command says how long.
- `short` has the same width and few blocks, at a small size, so that everything finishes. `record`,
  `calibrate` and `analyze` run once undisturbed, and once with a kill -9 about half-way and a
  second start; their files are compared byte by byte. Then `ablate`, `compare-methods` and
  `evaluate` run.

FOLDER may hold a model that an earlier run has fabricated with the same shape and blocks, and
nothing else: what an older run has recorded or analyzed would be taken for work of this one. It
ends with an error if a second start does not go on from what the kill has left, or gives other
bytes.

It prints a table, then the result as one line of JSON, and saves it in benchmarks/results/ after
each command, so that a run that is cut off has its results so far. With `--keep` a folder gets them
too, with logs and the analysis' units, in an archive of a few hundred kB; `--seconds` ends the run
in time. On another machine `--kept` goes on with that analysis, after the model has been fabricated
and its points recorded again, and `--commands` leaves out what is already measured.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Annotated, Literal, get_args

import typer

from benchmarks import report
from benchmarks.archives import unpack
from benchmarks.fixtures.fabricate import SHAPES, Size
from benchmarks.report import Row
from benchmarks.speed.study_bench import ANALYSIS, Bench, Words, check_goes_on, lines
from mini.world.scenes import Split, captions_of
from quant.calibration.prompts import MIN_PROMPTS
from quant.errors import QuantError
from quant.transformer.pipeline_weights import check_pipeline_weights
from quant.weights.fingerprint import read_transformer_config

Part = Literal["whole", "short"]
"""A model's folder has its part's name."""

STEPS = 4
"""As many as calibration has timestep groups: it takes no fewer."""


def main(  # noqa: PLR0913, PLR0917 (typer's way: the signature is the command line)
    work: Annotated[Path, typer.Option(help="Folder for models, points and studies.")],
    part: Annotated[Part, typer.Option(help="See above.")],
    shape: Annotated[Size, typer.Option(help="Whose shape the model has.")] = "14b",
    layers: Annotated[int | None, typer.Option(help="Blocks; default 40, or 4 if short.")] = None,
    size: Annotated[str | None, typer.Option(help="Default 832x480; short: 256x256.")] = None,
    frames: Annotated[int | None, typer.Option(help="Default 49, or 9 if short.")] = None,
    analyze_s: Annotated[float, typer.Option(help="Seconds after which it is killed.")] = 150,
    device: Literal["cuda", "cpu"] = "cuda",
    device_gb: Annotated[float, typer.Option(help="GB of the device that may be used.")] = 80,
    seconds: Annotated[float, typer.Option(help="When what runs is cut.")] = math.inf,
    commands: Annotated[str, typer.Option(help="Of the whole part, with commas.")] = "all",
    keep: Annotated[Path | None, typer.Option(help="Folder for what is to outlast work.")] = None,
    kept: Annotated[Path | None, typer.Option(help="An archive of it, to go on from.")] = None,
) -> None:
    """Fabricate the model and run the part's commands."""
    ends = time.perf_counter() + seconds
    chosen = chosen_commands(commands)
    work.mkdir(parents=True, exist_ok=True)
    check_fresh(work)
    if kept is not None:
        unpack(kept, work)
    is_whole = part == "whole"
    size = size or ("832x480" if is_whole else "256x256")
    frames = frames or (49 if is_whole else 9)
    layers = layers or (40 if is_whole else 4)
    settings: dict[str, object] = {
        "part": part,
        "shape": shape,
        "layers": layers,
        "size": size,
        "frames": frames,
    }
    settings |= {"steps": STEPS, "prompts": MIN_PROMPTS, "device_gb": device_gb}
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
    archive = keep and keep / f"studies-14b-{part}.tar.xz"
    bench = Bench(work, device, device_gb, settings, archive, ends)
    model = work / part
    fabricate(bench, model, shape, layers)
    for name, first in (("calibration", 0), ("held-out", MIN_PROMPTS)):
        captions = captions_of(Split.TRAIN, 2 * MIN_PROMPTS)[first : first + MIN_PROMPTS]
        (work / f"{name}.txt").write_text("\n".join(captions))
    # Without guidance a step is one pass.
    sampling: Words = ("--steps", STEPS, "--size", size, "--frames", frames)
    sampling = (*sampling, "--guidance-scale", 1, "--text-tokens", 512)
    if is_whole:
        whole(bench, model, sampling, analyze_s, chosen)
    else:
        short(bench, model, sampling)
    report.print_table(bench.rows)
    print(json.dumps(bench.document))


def check_fresh(work: Path) -> None:
    """Refuse a folder that holds anything but models.

    Raises:
        SystemExit: names what it holds.
    """
    others = sorted(each.name for each in work.iterdir() if each.name not in get_args(Part))
    if others:
        sys.exit(
            f"{work} holds {others[0]} of an earlier run, which would be taken for work of this "
            f"one: remove it and what else is there but {' and '.join(get_args(Part))}, or name "
            "another folder"
        )


def check_model(model: Path, shape: Size, layers: int) -> None:
    """Refuse a model of another shape than the settings say, or one that is not whole.

    Raises:
        SystemExit: names the first difference.
    """
    wanted = SHAPES[shape].transformer | {"num_layers": layers}
    try:
        found = read_transformer_config(model)
        for name, value in wanted.items():
            if found.get(name) != value:
                sys.exit(
                    f"{model} has {name} {found.get(name)}, and this run is for {value}: remove "
                    "it, or name another folder"
                )
        check_pipeline_weights(model)
    except QuantError as error:
        sys.exit(f"{model} is not a whole model: remove it, and it is made anew ({error})")


def fabricate(bench: Bench, model: Path, shape: Size, layers: int) -> None:
    """Write a model with random weights, unless an earlier run has.

    Raises:
        SystemExit: there is one with another shape, or an incomplete one.
    """
    if model.exists():
        check_model(model, shape, layers)
        return
    command = [sys.executable, "-m", "benchmarks.fixtures.fabricate", "--out", model]
    command += ["--size", shape, "--layers", layers, "--device", bench.device]
    started = time.perf_counter()
    subprocess.run([*map(str, command)], cwd=report.ROOT, check=True, stdout=sys.stderr)
    bench.keep(Row("fabricate: seconds", round(time.perf_counter() - started, 1), "s"))


def chosen_commands(text: str) -> set[str]:
    """Return which commands of the whole part run.

    Raises:
        SystemExit: one is unknown, or the points of `analyze` are left out.
    """
    known = ("record", "analyze", "calibrate")
    chosen = set(known) if text == "all" else set(text.split(","))
    if unknown := chosen - set(known):
        sys.exit(f"--commands has {min(unknown)}: take some of {', '.join(known)}")
    if "analyze" in chosen and "record" not in chosen:
        sys.exit("analyze needs the points of record: add it to --commands")
    return chosen


def whole(
    bench: Bench, model: Path, sampling: Words, analyze_s: float, chosen: Collection[str]
) -> None:
    """Record, analyze until time is up, and calibrate, as far as these are chosen."""
    prompts = ("--model", model, "--prompts", bench.work / "calibration.txt", *sampling)
    points = bench.work / "points"
    if "record" in chosen:
        bench.add("record", bench.run("record", "record", *prompts, "--keep", 1, "--out", points))
    if "analyze" in chosen:
        words: Words = ("--model", model, "--points", points, "--points-per-prompt", 1)
        _analyze_twice(bench, (*words, "--linear-points", 2, "--batch", 1), analyze_s)
    if "calibrate" in chosen:
        scales = bench.work / "s.safetensors"
        bench.add("calibrate", bench.run("calibrate", "calibrate", *prompts, "--out", scales))


def _analyze_twice(bench: Bench, words: Words, analyze_s: float) -> None:
    """Analyze until a kill, then go on for a third of that time."""
    analysis = bench.work / ANALYSIS
    words = ("analyze", *words, "--out", analysis)
    before = lines(analysis / "units.jsonl")
    if before:
        bench.keep(Row("analyze: units kept on another machine", len(before), "units"))
    end = time.perf_counter() + analyze_s
    run = bench.run("analyze", *words, until=lambda: time.perf_counter() > end)
    units = lines(analysis / "units.jsonl")
    if before:
        check_goes_on(before, units)
    bench.add("analyze, until kill -9", run)
    bench.keep(
        Row("analyze: units kept", len(units), "units"),
        Row("analyze: passes of a block on its bar", run.passes, "passes"),
    )
    end = time.perf_counter() + analyze_s / 3
    run = bench.run("analyze-again", *words, until=lambda: time.perf_counter() > end)
    again = lines(analysis / "units.jsonl")
    check_goes_on(units, again)
    bench.keep(
        Row("analyze, again: units, of which the first are those kept", len(again), "units"),
        Row("analyze, again: passes of a block on its bar", run.passes, "passes"),
    )


def short(bench: Bench, model: Path, sampling: Words) -> None:
    """Run every command to its end; three of them once more with a kill in the middle."""
    work = bench.work
    prompts = ("--model", model, "--prompts", work / "calibration.txt", *sampling)
    points = work / "points"
    killed(
        bench,
        "record",
        (*prompts, "--keep", 2),
        points,
        lambda out: len(list(out.glob("*.safetensors"))) >= MIN_PROMPTS // 2,
    )
    analysis = work / ANALYSIS
    words: Words = ("--model", model, "--points", points, "--recipe", "auto-hif8")
    words += ("--points-per-prompt", 1, "--linear-points", 2, "--batch", 4)
    half: list[int] = []

    def half_way(out: Path) -> bool:
        half[:] = half or [len(lines(analysis / "units.jsonl")) // 2]
        return len(lines(out / "units.jsonl")) >= half[0]

    killed(bench, "analyze", words, analysis, half_way)
    scales = work / "scales.safetensors"
    words = (*prompts, "--recipe", "auto-hif8", "--analysis", analysis)
    killed(bench, "calibrate", words, scales, lambda out: _prompts_done(out) >= MIN_PROMPTS // 2)
    held_out = ("--model", model, "--prompts", work / "held-out.txt", *sampling, "--keep", 2)
    bench.run("held-out", "record", *held_out, "--out", work / "held-out")
    studies: dict[str, Words] = {
        "ablate": (
            *("--points", work / "held-out", "--analysis", analysis, "--recipe", "auto-hif8"),
            *("--random-sets", 1, "--points-per-prompt", 1),
        ),
        "compare-methods": (
            *("--points", work / "held-out", "--calibration", points, "--recipe", "auto-hif8"),
            *("--methods", "hif8,hif8-gptq,int8-outliers,hif8-attention-hif8"),
            *("--points-per-prompt", 1, "--calibration-points-per-prompt", 1),
        ),
        "evaluate": (
            *("--candidate", f"auto={scales}", "--prompts", work / "held-out.txt", *sampling),
            *("--calibration-prompts", work / "calibration.txt", "--points", work / "held-out"),
            *("--judge", "latent-sqnr", "--judge", "psnr", "--batch", 2),
        ),
    }
    for name, words in studies.items():
        out = work / f"study-{name}"
        bench.add(name, bench.run(name, name, "--model", model, "--out", out, *words))


def killed(
    bench: Bench,
    name: str,
    words: Words,
    out: Path,
    half_way: Callable[[Path], bool],
) -> None:
    """Run a command undisturbed, and killed and started again, and compare what they write.

    Args:
        half_way: says of the second run's output whether it is time for the kill.

    Raises:
        SystemExit: the two differ.
    """
    bench.add(name, bench.run(name, name, *words, "--out", out))
    again = out.with_name(f"again-{out.name}")
    first = bench.run(f"{name}-killed", name, *words, "--out", again, until=lambda: half_way(again))
    second = bench.run(f"{name}-again", name, *words, "--out", again)
    files = {file.relative_to(out): file for file in sorted(out.rglob("*")) if file.is_file()}
    if out.is_file():
        files = {Path(): out}
    else:
        others = {file.relative_to(again) for file in again.rglob("*") if file.is_file()}
        if files.keys() != others:
            sys.exit(f"{name} wrote other files after a kill: {sorted(files.keys() ^ others)}")
    for place, file in files.items():
        if (again / place if place.parts else again).read_bytes() != file.read_bytes():
            sys.exit(f"{name}: {file} has other bytes after a kill and a second start")
    bench.keep(
        Row(f"{name}: seconds until kill -9", round(first.seconds, 1), "s"),
        Row(f"{name}: seconds of the second start", round(second.seconds, 1), "s"),
        Row(f"{name}: files with the same bytes as undisturbed", len(files), "files"),
    )


def _prompts_done(scales: Path) -> int:
    """Return how many prompts an unfinished calibration has kept."""
    partial = scales.with_name(f"{scales.name}.partial")
    try:
        with partial.open("rb") as file:
            head = file.read(1 << 16)
    except OSError:
        return 0
    found = re.search(rb'prompts_done\\+": (\d+)', head)
    return int(found[1]) if found else 0


if __name__ == "__main__":
    typer.run(main)
