"""Run a module on the simulated card: `python -m tests.npu.stand_in.launch MODULE ARGUMENTS…`.

As `python -m MODULE` would, but tensors on `npu` are computed (`simulated`). The process needs the
variables of `environment.environment`. With STAND_IN_REPORT in the environment, the file of that
name gets what was computed, as JSON, when the module ends by itself.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path

from tests.npu.stand_in import simulated


def main() -> None:
    """Run the module of the command line."""
    module, sys.argv = sys.argv[1], sys.argv[1:]
    report = os.environ.get("STAND_IN_REPORT")
    with simulated.simulated() as card:
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        finally:
            if report is not None:
                Path(report).write_text(json.dumps(card.report()))


if __name__ == "__main__":
    main()
