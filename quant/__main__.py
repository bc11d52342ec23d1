"""`python -m quant`: what must be so before torch loads, then `quant.cli`."""

import os

# Threads that spin while they wait hold up everything else on a shared machine (docs/log.md).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import signal
import sys

from quant.cli import app

if __name__ == "__main__":
    # As with Ctrl-C: what is half written is removed on the way out.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    app(prog_name="python -m quant")
