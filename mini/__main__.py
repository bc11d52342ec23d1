"""Run `python -m mini`: set the environment before torch is imported, then start `mini.cli`."""

import os

# OpenMP threads that spin while waiting slow down all else on a shared machine (docs/log.md).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from mini.cli import app

if __name__ == "__main__":
    app(prog_name="python -m mini")
