"""Test that a worker whose engine needs no torch starts without it."""

import subprocess
import sys

HEAVY = ("torch", "diffusers", "transformers", "scipy")


def test_the_queue_side_and_the_fake_engine_load_no_torch() -> None:
    code = (
        "import sys, worker.consumer.serve, worker.engine.fake_engine; "
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"
