"""Prepare the process before torch is imported, then run `worker.startup` or another command.

Usage: `python -m worker [--config FILE]` serves, `python -m worker plan [...]` prints the memory
that a model needs.
"""

import gc
import os
import sys


def run() -> None:
    """Run the worker's command line."""
    # By default OpenMP's threads spin while they wait for each other. If another process (ffmpeg,
    # the service) takes a core, the thread without one delays all others: on two shared cores a
    # pass of the miniature's transformer took over 7 s instead of 0.3 s. The variable is read once,
    # when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # Off until the worker is ready (`worker.startup`). Imports take a quarter less time.
    gc.disable()

    import typer  # noqa: PLC0415

    if sys.argv[1:2] == ["plan"]:
        from worker.model_loader.plan_table import main as plan  # noqa: PLC0415

        del sys.argv[1]
        sys.argv[0] = "python -m worker plan"
        typer.run(plan)
        return
    from worker.startup import main  # noqa: PLC0415

    typer.run(main)


if __name__ == "__main__":
    run()
