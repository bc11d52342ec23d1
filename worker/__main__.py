"""Prepare the process before torch is imported, then run `worker.startup` or another command.

Usage: `python -m worker [--config FILE]` serves, `python -m worker doctor [...]` checks a machine,
`python -m worker plan [...]` prints the memory that a model needs.
"""

import gc
import os
import sys

from worker.distributed.parent_death import end_with_torchrun


def run() -> None:
    """Run the worker's command line."""
    end_with_torchrun()
    # By default OpenMP's threads spin while they wait for each other. If another process (ffmpeg,
    # the service) takes a core, the thread without one delays all others: on two shared cores a
    # pass of the miniature's transformer took over 7 s instead of 0.3 s. The variable is read once,
    # when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # torch must not import torch_npu by itself: `quant.ascend` does, and says what is missing.
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    # Nor must diffusers, which does it wherever torch_npu is installed.
    sys.modules["torch_npu"] = None  # type: ignore[assignment]
    # Segments of torch_npu's memory that grow: jobs of different sizes leave gaps in fixed ones.
    # A driver that cannot do this makes torch_npu turn it off with a warning.
    os.environ.setdefault("PYTORCH_NPU_ALLOC_CONF", "expandable_segments:True")
    # Off until the worker is ready (`worker.startup`). Imports take a quarter less time.
    gc.disable()

    import typer  # noqa: PLC0415

    command = sys.argv[1] if len(sys.argv) > 1 else ""
    if command in ("doctor", "plan"):
        del sys.argv[1]
        sys.argv[0] = f"python -m worker {command}"
        if command == "doctor":
            from worker.doctor.command import doctor  # noqa: PLC0415

            typer.run(doctor)
        else:
            from worker.model_loader.plan_table import main as plan  # noqa: PLC0415

            typer.run(plan)
        return
    from worker.startup import main  # noqa: PLC0415

    typer.run(main)


if __name__ == "__main__":
    run()
