"""Test that the front end imports no heavy packages: it runs on machines without accelerator."""

import subprocess
import sys

FORBIDDEN = ("torch", "diffusers", "transformers", "numpy", "worker", "quant", "mini")
PROGRAM = f"""
import sys
import service.app, service.__main__
print(sorted(set(sys.modules) & set({FORBIDDEN!r})))
"""


def test_service_loads_no_torch() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
