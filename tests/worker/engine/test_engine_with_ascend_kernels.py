"""A job on kernels for Ascend, with exact operations in torch_npu's place: the CPU's video."""

from collections.abc import Iterator

import numpy as np
import pytest

from quant.kernels.ascend import AscendKernels
from quant.kernels.selection import KernelChoice
from tests.quant.kernels import npu_operations
from tests.support.job_controls import RecordingControl
from tests.support.requests import OWNER, generation_request
from worker.config import WorkerConfig
from worker.device import Device
from worker.engine.wan_engine import WanEngine
from worker.startup import load_engine


@pytest.fixture(scope="module")
def ascend_engine(config: WorkerConfig, device: Device) -> Iterator[WanEngine]:
    with pytest.MonkeyPatch.context() as patch:
        npu_operations.install(patch)
        kernels = AscendKernels.load(device.torch_device)
        patch.setattr(Device, "pick_kernels", lambda _self, **how: KernelChoice(kernels))
        yield load_engine(config, device)


@pytest.mark.parametrize("mode", ["bf16", "w8a8"])
def test_the_frames_are_those_of_plain_torch(
    engine: WanEngine, ascend_engine: WanEngine, mode: str
) -> None:
    request = generation_request(mode=mode, num_frames=5, num_inference_steps=1)
    found, expected = (
        np.stack(list(each.generate(request, RecordingControl(), OWNER).frames))
        for each in (ascend_engine, engine)
    )
    assert np.array_equal(found, expected)
    assert found.std() > 0


def test_the_modes_say_which_kernels_they_run_on(ascend_engine: WanEngine) -> None:
    assert {mode.kernels for mode in ascend_engine.modes} == {"ascend"}
