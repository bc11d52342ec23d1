"""Give a process of its own torch_npu's real wheel and a stand-in for CANN, without a card.

The wheel is in a folder of its own (`deploy/install/torch_npu.sh`), and the stand-in (`acl.c`) is
compiled once into it, under every name that torch_npu links to. `environment` returns the variables
of such a process; `python -m tests.npu.stand_in.launch MODULE …` in it also computes.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

from filelock import FileLock

ROOT = Path(__file__).resolve().parents[3]
WHEEL = Path(sys.prefix) / "npu-2.13"
NEWER_SCHEMAS = WHEEL / "schemas-2.14.0"
SOURCE = Path(__file__).with_name("acl.c")

# CANN's libraries that torch_npu links to. All of them are empty and need the one with the code, so
# that its state exists once.
LIBRARIES = ("ascendcl", "hccl", "acl_op_compiler", "ge_runner", "graph", "acl_tdt_channel")


def missing_reason() -> str | None:
    """Return why there is no wheel here, as its installation said; None if there is one."""
    if (WHEEL / "torch_npu" / "__init__.py").exists():
        return None
    said = WHEEL / "missing"
    return said.read_text().strip() if said.exists() else "torch_npu is not there: make test-npu"


@cache
def libraries() -> Path:
    """Compile the stand-in unless this version of it is there; return its folder."""
    folder = WHEEL / f"stand-in-{hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:12]}"
    with FileLock(WHEEL / "stand-in.lock"):
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=WHEEL) as made:
                _compile(Path(made))
                Path(made).rename(folder)
                Path(made).mkdir()  # for the end of the block
    return folder


def environment(**changes: str) -> dict[str, str]:
    """Return the variables of a process in which `import torch_npu` works; `changes` are added."""
    found = {name: value for name, value in os.environ.items() if not name.startswith("STAND_IN_")}
    # CANN's own variables would send torch_npu to an installation that is not the stand-in.
    for name in ("ASCEND_HOME_PATH", "ASCEND_OPP_PATH", "ASCEND_RT_VISIBLE_DEVICES"):
        found.pop(name, None)
    return found | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(WHEEL)]),
        "LD_LIBRARY_PATH": str(libraries()),
        # `import torch` would import torch_npu by itself; the product decides when.
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
        "OMP_NUM_THREADS": "1",
        **changes,
    }


def _compile(folder: Path) -> None:
    code = ["-shared", "-fPIC", "-O1", "-w", "-pthread", "-o", "libstand_in.so", str(SOURCE)]
    _run(["cc", *code], folder)
    for name in LIBRARIES:
        file = f"lib{name}.so"
        needs = ["-Wl,--no-as-needed", "-L.", "-lstand_in", "-Wl,-rpath,$ORIGIN"]
        empty = ["-x", "c", "/dev/null", *needs, f"-Wl,-soname,{file}"]
        _run(["cc", "-shared", "-o", file, *empty], folder)


def _run(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"the stand-in for CANN does not compile: {done.stderr}"
