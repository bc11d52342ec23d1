"""Measure whole jobs with sparse attention and few steps: `python -m benchmarks.speed.sparse_job`.

`--model` and `--scales` are what `python -m benchmarks.fixtures.fabricate --out MODEL --scales
FILE` has written. The worker's own engine runs jobs without guidance in `w8a8` with sparse
attention, from the prompt to the MP4, and with none and one of the first steps dense. Weights are
random, so nothing is said about quality: a share of mass of 0.3 keeps some 30 % of the blocks,
because all of them hold about the same.

A job of diffusers is computed, not run: guided steps are two passes each, and its VAE decodes them.
Both are measured by `benchmarks.speed.sparse_attention`, and given here in milliseconds and
seconds. Its text encoder and its MP4 are left out.

It prints a table, then the result as one line of JSON, and saves it in benchmarks/results/ after
each mode.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from pathlib import Path
from typing import Annotated

import typer

import quant
from benchmarks import report
from benchmarks.report import Row
from benchmarks.speed.pipeline import PROMPT, WHOLE, Seconds, bare_seconds
from worker.config import load_config
from worker.device import pick_device
from worker.settings import DeviceChoice
from worker.startup import load_engine, paused_gc

TEMPLATE = report.ROOT / "deploy" / "wan-14b.toml"
RECIPES = report.ROOT / "quant" / "recipe" / "presets"
DENSE_STEPS = (0, 1)


def main(  # noqa: PLR0913, PLR0917 (typer's way: the signature is the command line)
    model: Annotated[Path, typer.Option(help="The fabricated model's folder.")],
    scales: Annotated[Path, typer.Option(help="Scales of boundary-hif8 for it.")],
    pass_ms: Annotated[float, typer.Option(help="A pass of diffusers at this size.")] = 0,
    vae_s: Annotated[float, typer.Option(help="Diffusers' VAE at this size.")] = 0,
    size: str = "832x480",
    frames: int = 81,
    steps: int = 4,
    guided_steps: Annotated[int, typer.Option(help="Steps of diffusers.")] = 50,
    density: Annotated[float, typer.Option(help="Share of blocks to keep, about.")] = 0.3,
    rounds: Annotated[int, typer.Option(min=1, help="Jobs that count, after one.")] = 2,
    recipe: Annotated[str, typer.Option(help="A shipped recipe with [sparse].")] = (
        "boundary-hif8-sparse"
    ),
    device: str = "cuda",
) -> None:
    """Run the jobs and write the result."""
    choice: DeviceChoice = "cuda" if device == "cuda" else "cpu"
    on = pick_device(choice, 8)
    with tempfile.TemporaryDirectory() as folder, paused_gc():  # as in a worker
        config = write_config(Path(folder), model, scales, recipe, density, steps)
        engine = load_engine(load_config(config), on)
    settings = {
        "size": size,
        "frames": frames,
        "steps": steps,
        "guidance": 1.0,
        "recipe": recipe,
        "share_of_mass": density,
        "diffusers": {"steps": guided_steps, "pass_ms": pass_ms, "vae_s": vae_s},
        "kernels": {name: mode.offer.kernels for name, mode in engine.loaded.items()},
        "rounds": rounds,
    }
    rows: list[Row] = []
    for mode in engine.loaded:
        found: list[Seconds] = []
        for number in range(rounds + 1):
            body = {"size": size, "num_frames": frames, "num_inference_steps": steps, "seed": 7}
            prompt = {"prompt": f"{PROMPT}, take {number} of {mode}"}
            found.append(bare_seconds(engine, mode, body | prompt))
        for stage in found[0]:
            seconds = round(statistics.median(each[stage] for each in found[1:]), 3)
            rows += report.log_rows([Row(f"{mode}: {stage.removesuffix('_s')}", seconds, "s")])
        sparse = quant.sparse_attention_of(engine.loaded[mode].transformer)
        shares = None if sparse is None else sparse.shares()
        if shares is not None:
            rows += report.log_rows(
                [
                    Row(f"{mode}: density of sparse passes", round(shares.density, 4), ""),
                    Row(f"{mode}: mass that these hold", round(shares.mass, 4), ""),
                ]
            )
        if pass_ms:
            whole = statistics.median(each[WHOLE] for each in found[1:])
            theirs = 2 * guided_steps * pass_ms / 1000 + vae_s
            what = f"diffusers, {guided_steps} guided steps, computed, over {mode}"
            ratio = round(theirs / whole, 2)
            rows += report.log_rows(
                [Row(f"{what}: seconds", round(theirs, 1), "s"), Row(what, ratio, "x")]
            )
        document = report.result("sparse-job", on.name, settings, rows)
        report.save(document)
    report.print_table(rows)
    print(json.dumps(document))


def write_config(
    folder: Path, model: Path, scales: Path, recipe: str, density: float, steps: int
) -> Path:
    """Write a worker's configuration: a mode of few steps for each number of dense ones."""
    text = TEMPLATE.read_text(encoding="utf-8").partition("[[modes]]")[0]
    for old, new in (
        ('"../models/wan2.1-t2v-14b"', json.dumps(str(model.resolve()))),
        ("default_guidance_scale = 5.0", "default_guidance_scale = 1.0"),
        ("default_steps = 50", f"default_steps = {steps}"),
        ('default_mode = "w8a8"', f'default_mode = "dense-steps-{DENSE_STEPS[0]}"'),
    ):
        assert old in text, f"{TEMPLATE} has no {old}"
        text = text.replace(old, new)
    shipped = (RECIPES / f"{recipe}.toml").read_text(encoding="utf-8")
    for dense in DENSE_STEPS:
        name = f"dense-steps-{dense}"
        lines = []
        for line in shipped.splitlines():
            key = line.partition(" =")[0]
            values = {"share_of_mass": density, "dense_steps": dense, "name": json.dumps(name)}
            lines.append(f"{key} = {values[key]}" if key in values else line)
        (folder / f"{name}.toml").write_text("\n".join(lines) + "\n", encoding="utf-8")
        text += f'\n[[modes]]\nname = "{name}"\ndescription = "measured"\n'
        text += f"recipe = {json.dumps(str(folder / f'{name}.toml'))}\n"
        text += f"scales = {json.dumps(str(scales.resolve()))}\n"
    file = folder / "worker.toml"
    file.write_text(text, encoding="utf-8")
    return file


if __name__ == "__main__":
    typer.run(main)
