"""Check what is around torch: versions, driver, CANN, ffmpeg and the scratch folder."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from jobs.errors import WorkerUnfit
from quant import ascend
from worker.doctor.report import Fault, Finding
from worker.job.fitness import check_fitness, refused_by_system
from worker.process.scratch import scratch_folder
from worker.settings import DeviceChoice

_PACKAGES = (
    "wan-hif8",
    "torch",
    "torch_npu",
    "triton",
    "triton-ascend",
    "diffusers",
    "transformers",
)
_TOOL_S = 20.0

_DRIVER_FILE = Path("/usr/local/Ascend/driver/version.info")
_CANN_FILES = ("version.cfg", "compiler/version.info", "runtime/version.info", "version.info")


def versions() -> Finding:
    """List versions, and refuse a torch and a `torch_npu` that do not go together."""
    found = {name: version for name in _PACKAGES if (version := _version(name)) is not None}
    torch, npu = found.get("torch"), found.get("torch_npu")
    if torch is None:
        raise Fault("torch is not installed", "install wan-hif8[worker]")
    if npu is not None and ascend.release(npu) != ascend.release(torch):
        problem, _, remedy = ascend.pair_problem(torch, npu).partition("; ")
        raise Fault(problem, remedy)
    detail = ", ".join(f"{name} {version}" for name, version in found.items())
    machine = f"{platform.system()} {platform.release()} {platform.machine()}"
    return Finding(f"Python {platform.python_version()} on {machine}, {detail}", value=found)


def driver(wanted: DeviceChoice) -> Finding | None:
    """Ask the tool of the driver about the cards; None where no card is wanted or there."""
    if wanted != "cpu":
        for name, arguments in _TOOLS.items():
            if shutil.which(name) is not None:
                return _ask_tool(name, arguments)
    if wanted in ("cuda", "npu"):
        name = "nvidia-smi" if wanted == "cuda" else "npu-smi"
        return Finding(
            f"there is no {name} on PATH",
            note=f"install the driver, or mount its tools into the container; without {name} this "
            "report lacks the driver's version and who uses the card",
        )
    return None


_TOOLS = {
    "npu-smi": ["info"],
    "nvidia-smi": [
        "--query-gpu=index,name,driver_version,memory.total,memory.used",
        "--format=csv",
    ],
}


def _ask_tool(name: str, arguments: list[str]) -> Finding:
    try:
        done = subprocess.run(
            [name, *arguments], capture_output=True, text=True, timeout=_TOOL_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Fault(
            f"{name} does not answer ({error})", "restart the driver, or the machine"
        ) from None
    text = (done.stdout + done.stderr).strip()
    if any(code in text for code in ("-8005", "-8020")):
        raise Fault(
            f"{name} says that the card is in use: {text[:300]}",
            "end the other container that has the card, or give this one another",
        )
    if done.returncode:
        raise Fault(f"{name} ends with {done.returncode}: {text[:300]}", "reinstall the driver")
    lines = [line for line in text.splitlines() if any(each.isalnum() for each in line)]
    figures = {f"line {index}": line.strip(" |") for index, line in enumerate(lines[:40])}
    if _DRIVER_FILE.is_file() and name == "npu-smi":
        figures |= {"driver": " ".join(_DRIVER_FILE.read_text(errors="replace").split())}
    return Finding(f"{name} answers", figures=figures)


def cann(wanted: DeviceChoice) -> Finding | None:
    """Find CANN and its version; None where no Ascend card is wanted."""
    home = next((os.environ[n] for n in ascend.CANN_VARIABLES if os.environ.get(n)), None)
    if home is None:
        if wanted != "npu":
            return None
        raise Fault(
            f"CANN is not set up: none of {', '.join(ascend.CANN_VARIABLES)} is set",
            "install CANN and run 'source /usr/local/Ascend/cann/set_env.sh' before the start",
        )
    for name in _CANN_FILES:
        path = Path(home) / name
        if path.is_file():
            text = " ".join(path.read_text(errors="replace").split())
            return Finding(f"{home}: {text[:200]}")
    return Finding(
        f"CANN is in {home}, and none of {', '.join(_CANN_FILES)} is there",
        note="its version is unknown; see that the toolkit and the kernels are installed",
    )


def environment() -> Finding:
    """List the variables that change how torch and its devices run."""
    prefixes = ("ASCEND", "HCCL", "NCCL", "CUDA_", "PYTORCH_", "TORCH_", "OMP_", "GLOO", "WORKER_")
    figures = {n: v for n, v in sorted(os.environ.items()) if n.startswith(prefixes)}
    note = None
    if "RANK_TABLE_FILE" in os.environ:
        note = "RANK_TABLE_FILE is set: unset it, because ranks are torchrun's here"
    elif os.environ.get("ASCEND_LAUNCH_BLOCKING") == "1":
        note = "ASCEND_LAUNCH_BLOCKING is 1: each operation waits; unset it but for debugging"
    return Finding(f"{len(figures)} variables, started by {sys.executable}", note, figures)


def ffmpeg() -> Finding:
    """Encode a few frames in a scratch folder, as each start and each job does."""
    try:
        with scratch_folder() as scratch:
            check_fitness(scratch, 0)
            return Finding(
                f"ffmpeg encodes, and {scratch.parent} takes what a job writes", value=True
            )
    except (OSError, WorkerUnfit) as error:
        unfit = refused_by_system(error) if isinstance(error, OSError) else error
        raise Fault(
            f"{unfit}{f' ({error})' if isinstance(error, OSError) else ''}",
            "install the package imageio-ffmpeg again, or set IMAGEIO_FFMPEG_EXE to an ffmpeg with "
            "libx264, and see that TMPDIR names a folder with free space",
        ) from error


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
