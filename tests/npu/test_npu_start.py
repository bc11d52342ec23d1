"""Start a worker where torch_npu is installed and something is missing: one sentence says what.

Processes of their own, without the simulation. Those that need no worker around the device fork
from one that has imported torch, which takes most of the time.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.npu.stand_in.environment import ROOT, environment, libraries, missing_reason

pytestmark = pytest.mark.skipif(missing_reason() is not None, reason=str(missing_reason()))

FORKS = """
import ctypes, os, sys, warnings
import torch
from worker.device import pick_device

def load(folder):
    # As LD_LIBRARY_PATH would; that is read at the start of a process only.
    for name in ("libstand_in.so", "libascendcl.so", "libhccl.so", "libacl_op_compiler.so",
                 "libge_runner.so", "libgraph.so", "libacl_tdt_channel.so"):
        ctypes.CDLL(os.path.join(folder, name), ctypes.RTLD_GLOBAL)

def no_card(folder):
    os.environ["STAND_IN_DEVICES"] = "0"
    load(folder)

def other_version(folder):
    load(folder)
    sys.path.insert(0, sys.argv[2])

def cuda_beside(folder):
    load(folder)
    torch._C._get_accelerator = lambda: torch.device("cuda")

def beyond_the_last(folder):
    load(folder)

for case in (no_card, other_version, cuda_beside, beyond_the_last):
    sys.stdout.flush()
    if os.fork():
        os.wait()
        continue
    try:
        case(sys.argv[1])
        print(case.__name__, "started", pick_device("npu", 1, 3 if case is beyond_the_last else 0))
    except Exception as error:
        print(case.__name__, type(error).__name__, error)
    sys.stdout.flush()
    os._exit(0)
"""


@pytest.fixture(scope="module")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What `pick_device` raises in each case."""
    other = tmp_path_factory.mktemp("other") / "torch_npu-2.12.0.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.4\nName: torch_npu\nVersion: 2.12.0\n")
    done = subprocess.run(
        [sys.executable, "-c", FORKS, str(libraries()), str(other.parent)],
        cwd=ROOT,
        env=environment(LD_LIBRARY_PATH=""),
        capture_output=True,
        text=True,
        check=True,
    )
    lines = (line.partition(" ") for line in done.stdout.splitlines())
    return {name: said for name, _, said in lines}


SAYS = {
    "no_card": ("there is no Ascend card in this ", "install the driver, or start the container"),
    "other_version": ("torch_npu 2.12.0 does not go with torch 2.13", "it needs torch 2.12"),
    "cuda_beside": ("refuses this torch, which is built for CUDA", "install the build of torch"),
    "beyond_the_last": ("npu device 3, and there are 1 here", "start as many processes"),
}


@pytest.mark.parametrize("case", SAYS)
def test_a_card_that_cannot_be_used_is_refused_with_the_remedy(
    sentences: dict[str, str], case: str
) -> None:
    if case == "no_card" and any(Path("/dev").glob("davinci[0-9]*")):
        pytest.fail("this machine has an Ascend card: run these tests where there is none")
    said = sentences[case]
    assert said.startswith("DeviceUnavailable "), said
    for part in SAYS[case]:
        assert part in said, said


def test_without_cann_the_worker_ends_with_one_line_and_the_remedy(
    redis_url: str, tmp_path: Path
) -> None:
    """As users start it: torch would load torch_npu by itself, and end with a traceback."""
    variables = environment(
        LD_LIBRARY_PATH="",
        REDIS_URL=redis_url,
        ARTIFACTS_URL=(tmp_path / "artifacts").as_uri(),
        WORKER_DEVICE="npu",
    )
    del variables["TORCH_DEVICE_BACKEND_AUTOLOAD"]
    done = subprocess.run(
        [sys.executable, "-m", "worker"],
        cwd=ROOT,
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("worker: WORKER_DEVICE is 'npu', but lib"), done.stderr
    assert "of CANN is missing: install CANN" in line
    assert "Traceback" not in done.stderr
