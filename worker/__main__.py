"""Prepare the process before torch is imported, then run `worker.startup`.

Usage: `python -m worker [--config FILE]`.
"""

import gc
import os


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

    from worker.startup import main  # noqa: PLC0415

    typer.run(main)


if __name__ == "__main__":
    run()
