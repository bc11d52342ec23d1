"""Refuses files too large for the repository: 1 MiB each, and 32 MiB in all below models/.

Called by pre-commit with the staged files. Weights of real models are mounted, never committed.
"""

import subprocess
import sys
from pathlib import Path

_MIB = 1 << 20
_FILE_MIB = 1
_MODELS_MIB = 32
_MODELS = "models/"


def main() -> None:
    complaints = [
        f"{name} has {Path(name).stat().st_size / _MIB:.1f} MiB; the bound is {_FILE_MIB} MiB"
        for name in sys.argv[1:]
        if not name.startswith(_MODELS) and Path(name).stat().st_size > _FILE_MIB * _MIB
    ]
    listed = subprocess.run(
        ["git", "ls-files", "-z", _MODELS], capture_output=True, text=True, check=True
    ).stdout
    weights = [Path(name) for name in listed.split("\0") if name]
    total = sum(path.stat().st_size for path in weights if path.exists()) / _MIB
    if total > _MODELS_MIB:
        complaints.append(f"{_MODELS} holds {total:.1f} MiB; the bound is {_MODELS_MIB} MiB")
    if complaints:
        sys.exit("\n".join(complaints))


if __name__ == "__main__":
    main()
