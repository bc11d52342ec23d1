"""Test the OpenAPI document with thousands of generated requests against a real service.

Requests are valid and invalid; no answer is a server error, and every answer is in the document.

`make fuzz` runs the same for longer. What counts as accepted is in schemathesis.toml.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.local.cluster import Cluster
from deploy.local.stack import ROOT

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "40"))
"""Generated requests per operation and phase."""

LEAST_CASES = int(os.environ.get("FUZZ_LEAST_CASES", "1000"))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_answer_is_in_the_document(tmp_path: Path) -> None:
    engine = (sys.executable, "-m", "benchmarks.serving.fake_worker", "0")
    environment = {"SERVICE_MAX_WAITING": "100000", "SERVICE_RATE": "10000000/minute"}
    site = Cluster(tmp_path / "site", apis=1, workers=1, worker=engine, environment=environment)
    with site:
        command = [
            *(sys.executable, "-m", "schemathesis.cli", "run", f"{site.urls[0]}/openapi.json"),
            *("--max-examples", str(EXAMPLES), "--seed", "1", "--continue-on-failure"),
            *("--header", f"Authorization: Bearer {_ops_key(site)}"),
            *("--request-timeout", "20", "--suppress-health-check", "all", "--no-color"),
        ]
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=3000
        )
        assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-2000:] + site.logs()
    generated = re.search(r"(\d+) generated", done.stdout)
    assert generated, done.stdout
    assert int(generated.group(1)) >= LEAST_CASES, done.stdout[-3000:]
    sys.stdout.write(done.stdout[-3000:])  # shown by `make fuzz`


def _ops_key(site: Cluster) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "service", "keys", "add", "fuzz", "--role", "ops"],
        env=site.environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return next(word for word in done.stdout.split() if word.startswith("wan_"))
