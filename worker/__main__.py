"""`python -m worker [--config FILE]`: what must be so before torch loads, then `worker.startup`."""

import gc
import os


def run() -> None:
    """Run the worker's command line."""
    # OpenMP's threads spin while they wait for each other. Where anything else runs (ffmpeg, the
    # service), one thread without a core then holds up all others: on two shared cores a run of
    # the miniature's transformer took over 7 s instead of 0.3 s. Read once, when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # Until the worker is ready (`worker.startup`). Imports take a quarter less.
    gc.disable()

    import typer  # noqa: PLC0415

    from worker.startup import main  # noqa: PLC0415

    typer.run(main)


if __name__ == "__main__":
    run()
