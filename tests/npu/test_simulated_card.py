"""Run the tests of `tests/npu/card` on a simulated card, in a process of their own.

In this process `import torch_npu` would change torch for every test that follows.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.npu.stand_in.environment import ROOT, environment, missing_reason

pytestmark = [
    pytest.mark.skipif(missing_reason() is not None, reason=str(missing_reason())),
    pytest.mark.timeout(1800),
]

CARD = Path(__file__).with_name("card")
MOST_SKIPPED = 0


def test_every_test_of_a_card_passes_on_the_simulated_one(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "tests.npu.stand_in.launch", "pytest", str(CARD)]
    command += ["-m", "npu", "-q", "-s", "-p", "no:cacheprovider", "--durations=5"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment(STAND_IN_REPORT=str(report)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    print(f"\n{done.stdout}")
    assert done.returncode == 0, done.stdout
    closing = done.stdout.strip().splitlines()[-1]
    assert re.search(r"\d+ passed", closing), closing
    assert "skipped" not in closing
    found = json.loads(report.read_text())
    print(
        f"simulated card: {sum(found['ops'].values()):,} operators computed, "
        f"{len(found['ops'])} kinds in {sum(found['shapes'].values()):,} shapes; "
        f"without a kernel of torch_npu: {found['fallbacks'] or 'none'}; "
        f"in float64: {found['float64'] or 'none'}"
    )
