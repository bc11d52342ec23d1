"""Run `python -m quant`: set the environment before torch is imported, then start `quant.cli`."""

import os
import signal
import sys

# OpenMP threads that spin while waiting slow down all else on a shared machine (docs/log.md).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# torch must not import torch_npu by itself: `quant.ascend` does, and says what is missing.
os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
# Nor must diffusers, which does it wherever torch_npu is installed.
sys.modules["torch_npu"] = None  # type: ignore[assignment]

from quant.cli import app  # noqa: E402


def run() -> None:
    """Run the toolkit's command line."""
    # Exit by an exception, as with Ctrl-C, so that half-written files are removed.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    app(prog_name="python -m quant")


if __name__ == "__main__":
    run()
