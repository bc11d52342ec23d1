"""`python -m quant`: what must be so before torch loads, then `quant.cli`."""

import os

# Threads that spin while they wait hold up everything else on a shared machine (docs/log.md).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from quant.cli import app

if __name__ == "__main__":
    app(prog_name="python -m quant")
