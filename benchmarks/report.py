"""Write a benchmark's results as a table on stdout and a JSON file in benchmarks/results/."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"

EQUAL_DB = 200.0  # reported for equal tensors, whose infinite SQNR JSON cannot represent


@dataclass(frozen=True, slots=True)
class Row:
    """One measured value.

    Attributes:
        baseline: the value it is compared with, from the same run; None if its bound is absolute.
        low: with `high`, the 95 % confidence interval of `value`.
    """

    what: str
    value: float
    unit: str
    baseline: float | None = None
    low: float | None = None
    high: float | None = None

    @property
    def ratio(self) -> float | None:
        """The value divided by the baseline."""
        return round(self.value / self.baseline, 4) if self.baseline else None


def result(
    benchmark: str, device: str, settings: dict[str, Any], rows: list[Row]
) -> dict[str, Any]:
    """Build the JSON document of one run."""
    return {
        "benchmark": benchmark,
        "date": datetime.now(UTC).date().isoformat(),
        "commit": _commit(),
        "device": device,
        "versions": _versions(),
        "settings": settings,
        "rows": [_row(row) for row in rows],
    }


def save(document: dict[str, Any]) -> Path:
    """Write the document to benchmarks/results/; return its path."""
    RESULTS.mkdir(exist_ok=True)
    device = re.sub(r"[^a-z0-9]+", "-", document["device"].lower()).strip("-")
    path = RESULTS / f"{document['date']}-{device}-{document['benchmark']}.json"
    path.write_text(json.dumps(document, indent=2) + "\n")
    return path


def log_rows(rows: Iterable[Row]) -> list[Row]:
    """Print each row to stderr once it is measured, so that an aborted run has shown it."""
    logged = []
    for row in rows:
        baseline = "" if row.baseline is None else f" (baseline {row.baseline:g})"
        print(f"{row.what}: {row.value:g} {row.unit}{baseline}", file=sys.stderr, flush=True)
        logged.append(row)
    return logged


def print_table(rows: list[Row]) -> None:
    """Print values, baselines and ratios in columns."""
    width = max(len(row.what) for row in rows) + 2
    print(f"{'what':<{width}}{'value':>10}{'baseline':>10}{'ratio':>8}  95 % interval")
    for row in rows:
        baseline = f"{row.baseline:.3f}" if row.baseline is not None else "-"
        ratio = f"{row.ratio:.3f}" if row.ratio is not None else "-"
        spread = f"{row.low:.3f} .. {row.high:.3f}" if row.low is not None else ""
        print(f"{row.what:<{width}}{row.value:>10.3f}{baseline:>10}{ratio:>8}  {spread} {row.unit}")


def _versions() -> dict[str, str]:
    """Return the versions of libraries that results depend on; those for CUDA only with a GPU."""
    found = {name: version(name) for name in ("torch", "diffusers", "transformers", "rq")}
    if not torch.cuda.is_available():
        return found
    cudnn = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    found |= {"CUDA": str(torch.version.cuda), "cuDNN": str(cudnn)}
    for name in ("triton", "fa3-fwd", "flash-attn-3", "fastsafetensors"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _row(row: Row) -> dict[str, Any]:
    filled = {name: value for name, value in asdict(row).items() if value is not None}
    return filled | ({"ratio": row.ratio} if row.ratio is not None else {})


def _commit() -> str:
    """Return the measured commit; uncommitted results do not make it dirty.

    For a copy without git history, set BENCHMARK_COMMIT.
    """
    if commit := os.environ.get("BENCHMARK_COMMIT"):
        return commit
    try:
        commit = _git("describe", "--always")
        changed = _git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{commit}-dirty" if changed else commit


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()
