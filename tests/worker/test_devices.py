"""Which device is picked, and what it says about itself, on a machine that has only a CPU."""

import os

import pytest
import torch

from worker.devices import DeviceChoice, pick_device, usable_cores
from worker.errors import DeviceUnavailable


@pytest.fixture(autouse=True)
def _same_threads_afterwards():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_threads_default_to_every_core_this_process_may_use() -> None:
    assert usable_cores() == len(os.sched_getaffinity(0))
    assert pick_device("cpu").name == f"cpu, {usable_cores()} threads"
    assert torch.get_num_threads() == usable_cores()


def test_threads_can_be_set() -> None:
    assert pick_device("cpu", threads=1).name == "cpu, 1 threads"
    assert torch.get_num_threads() == 1


def test_the_cpu_computes_in_bf16_with_a_float32_vae_and_has_no_memory_figures() -> None:
    device = pick_device("cpu", threads=1)
    assert device.torch_device == torch.device("cpu")
    assert (device.dtype, device.vae_dtype) == (torch.bfloat16, torch.float32)
    assert device.memory() is None
    assert device.attention_backend is None
    device.synchronize()


@pytest.mark.parametrize("wanted", ["cuda", "npu"])
def test_a_device_that_is_not_there_is_refused_with_the_remedy(wanted: DeviceChoice) -> None:
    if getattr(torch, wanted, None) is not None and getattr(torch, wanted).is_available():
        assert pick_device(wanted, threads=1).kind == wanted
        return
    with pytest.raises(DeviceUnavailable, match=f"'{wanted}'.*'auto'"):
        pick_device(wanted, threads=1)


def test_auto_takes_what_is_there() -> None:
    accelerators = [
        kind
        for kind in ("npu", "cuda")
        if getattr(torch, kind, None) is not None and getattr(torch, kind).is_available()
    ]
    assert pick_device("auto", threads=1).kind == (accelerators or ["cpu"])[0]
