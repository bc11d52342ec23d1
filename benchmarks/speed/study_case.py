"""Run a command of the toolkit in this process, and keep writing how much memory it has taken.

`python -m benchmarks.speed.study_case PEAKS DEVICE_GB COMMAND …`, used by `studies_14b` beside it.

A thread writes the peaks to a file several times a second, so that they outlast a kill. On a GPU
the process may allocate DEVICE_GB at most: what needs more fails here, too.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path

import torch

from quant.cli import app

_EVERY_S = 0.2
_STATUS = Path("/proc/self/status")


def main() -> None:
    """Limit the device's memory, start the thread and run the command."""
    peaks, device_gb, *command = sys.argv[1:]
    if torch.cuda.is_available():
        _, total = torch.cuda.mem_get_info()
        torch.cuda.set_per_process_memory_fraction(min(1.0, float(device_gb) * 1e9 / total))
    threading.Thread(target=_watch, args=(Path(peaks),), daemon=True).start()
    app(command)


def _watch(file: Path) -> None:
    largest = {"host_bytes": 0, "host_anonymous_bytes": 0, "device_bytes": 0}
    while True:
        fields = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
        now = {
            "host_bytes": _bytes(fields["VmHWM"]),
            "host_anonymous_bytes": _bytes(fields["RssAnon"]),
            "device_bytes": _device_bytes(),
        }
        largest = {name: max(value, now[name]) for name, value in largest.items()}
        part = file.with_suffix(".part")
        part.write_text(json.dumps(largest))
        os.replace(part, file)
        time.sleep(_EVERY_S)


def _bytes(field: str) -> int:
    return 1024 * int(field.split(maxsplit=1)[0])


def _device_bytes() -> int:
    """Return the most that torch has reserved on the GPU, if the command has used one."""
    used = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return torch.cuda.max_memory_reserved() if used else 0


if __name__ == "__main__":
    main()
