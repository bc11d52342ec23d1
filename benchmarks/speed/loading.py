"""Measure how long a worker takes until it is ready.

`python -m benchmarks.speed.loading --model DIR --packed DIR`, with folders that
`benchmarks.fixtures.fabricate` and `python -m quant convert` have written.

The cases are packed w8a8 (with and without text encoder and VAE), both modes, and BF16. Each start
runs in its own process with all files in the page cache; a first start of each case, in which
Triton compiles, is not counted. There are two baselines, measured in the same processes: the
safetensors library loading as many bytes of the same files onto the device, and a copy of as many
bytes from pinned memory, without files. The tensors that a worker loads are compared with those of
the library, bit by bit. Work that does not depend on the checkpoint (imports, the first access to
the device, trying its kernels and preparing the readers of weights) has its own rows, and so has
the tokenizer, which is read in parallel.

It prints a table, then the result as one line of JSON, and saves it in benchmarks/results/.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import report
from benchmarks.report import Row
from benchmarks.speed.loading_case import Start
from quant.recipe.recipe import DEFAULT_RECIPE

GIB = 2**30
TEMPLATE = report.ROOT / "deploy" / "wan-14b.toml"
TRANSFORMER = "packed w8a8, transformer only"
CASES = {
    TRANSFORMER: ("w8a8",),
    "packed w8a8": ("w8a8",),
    "both modes": ("bf16", "w8a8"),
    "bf16": ("bf16",),
}


def main(  # noqa: PLR0913, PLR0917 (typer's way: the signature is the command line)
    model: Annotated[Path, typer.Option(help="Pipeline folder in diffusers format.")],
    packed: Annotated[Path, typer.Option(help="Packed checkpoint made of it.")],
    recipe: Annotated[str, typer.Option(help="The recipe it is packed with.")] = DEFAULT_RECIPE,
    device: str = "cuda",
    rounds: Annotated[int, typer.Option(min=1, help="Starts of each kind that count.")] = 3,
    only: Annotated[str, typer.Option(help="Kinds, by semicolon.")] = ";".join(CASES),
    keep: Annotated[bool, typer.Option(help="Write into benchmarks/results/.")] = True,
) -> None:
    """Measure the starts of each case and write the result."""
    measured: dict[str, list[Start]] = {name: [] for name in only.split(";")}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds + 1):
            for name, starts in measured.items():
                config = write_config(Path(folder), CASES[name], model, packed, recipe)
                start = run_case(config, device, name == TRANSFORMER, baselines=number > 0)
                if number:
                    starts.append(start)
                print(f"round {number} of {rounds}, {name}: {start.loading_s:.2f} s", flush=True)
    rows = [row for name, starts in measured.items() for row in rows_of(name, starts)]
    settings = {
        "model": model.name,
        "recipe": recipe,
        "rounds": rounds,
        "statistic": "median",
        "files": "in the page cache",
    }
    device_name = next(iter(measured.values()))[0].device
    document = report.result("loading", device_name, settings, rows)
    report.print_table(rows)
    if keep:
        report.save(document)
    print(json.dumps(document))


def write_config(
    folder: Path, modes: tuple[str, ...], model: Path, packed: Path, recipe: str
) -> Path:
    """Write a worker's configuration for some modes: that of the 14B with other paths."""
    text = TEMPLATE.read_text(encoding="utf-8").partition("[[modes]]")[0]
    text = text.replace('"../models/wan2.1-t2v-14b"', json.dumps(str(model.resolve())))
    text = text.replace('default_mode = "w8a8"', f'default_mode = "{modes[-1]}"')
    for name in modes:
        text += f'\n[[modes]]\nname = "{name}"\ndescription = "measured"\n'
        if name != "bf16":
            text += f'recipe = "{recipe}"\npacked = {json.dumps(str(packed.resolve()))}\n'
    file = folder / "worker.toml"
    file.write_text(text, encoding="utf-8")
    return file


def run_case(config: Path, device: str, only_modes: bool, *, baselines: bool) -> Start:
    """Measure one start in a new process, whose stderr stays visible."""
    # Without garbage collection during imports, as in `worker.__main__`.
    code = "import gc; gc.disable(); from benchmarks.speed.loading_case import run; run()"
    command = [sys.executable, "-c", code, str(config)]
    command += ["--device", device, "--started", str(time.time())]
    command += ["--only-modes"] if only_modes else []
    command += [] if baselines else ["--no-baselines"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True, cwd=report.ROOT)
    values: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return Start(**values)


def rows_of(name: str, starts: list[Start]) -> list[Row]:
    """Return the rows of one case."""

    def median(attribute: str) -> float:
        return statistics.median(float(getattr(start, attribute)) for start in starts)

    transformer, components = median("transformer_bytes"), median("components_bytes")
    tokenizer_s = round(median("tokenizer_s"), 3)
    ready, size = round(median("loading_s"), 3), transformer + components
    library, pinned = (median(f"{source}_bytes_per_s") for source in ("library", "pinned"))
    return [
        Row(
            f"{name}: ready to serve (baseline: safetensors)", ready, "s", round(size / library, 3)
        ),
        Row(f"{name}: ready to serve (baseline: pinned)", ready, "s", round(size / pinned, 3)),
        Row(f"{name}: safetensors", round(library / GIB, 2), "GiB/s"),
        Row(f"{name}: pinned", round(pinned / GIB, 2), "GiB/s"),
        Row(f"{name}: of it checks before loading", round(median("checks_s"), 3), "s"),
        Row(f"{name}: imports before", round(median("imports_s"), 3), "s"),
        Row(f"{name}: the device's first answer", round(median("device_s"), 3), "s"),
        Row(f"{name}: its kernels tried", round(median("kernels_s"), 3), "s"),
        *([Row(f"{name}: beside, its tokenizer read", tokenizer_s, "s")] if components else []),
        Row(f"{name}: all of that, from the process' start", round(median("whole_s"), 3), "s"),
        Row(f"{name}: transformer on the device", round(transformer / GIB, 3), "GiB"),
        Row(f"{name}: text encoder and VAE there", round(components / GIB, 3), "GiB"),
        Row(f"{name}: peak while loading", round(median("peak_bytes") / GIB, 3), "GiB"),
        Row(f"{name}: as the library reads them", median("compared_tensors"), "tensors"),
    ]


if __name__ == "__main__":
    typer.run(main)
