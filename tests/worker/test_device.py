"""Test which device is picked and what it reports, on a machine that has only a CPU."""

import os

import pytest
import torch

from worker.device import Device, pick_device, usable_cores
from worker.errors import DeviceUnavailable, RanksLost
from worker.settings import DeviceChoice


@pytest.fixture(autouse=True)
def _same_threads_afterwards():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_threads_default_to_every_core_this_process_may_use() -> None:
    assert usable_cores() == len(os.sched_getaffinity(0))
    cores = usable_cores()
    assert pick_device("cpu").name == f"cpu, {cores} thread{'s' if cores > 1 else ''}"
    assert torch.get_num_threads() == usable_cores()


def test_threads_can_be_set() -> None:
    assert pick_device("cpu", threads=1).name == "cpu, 1 thread"
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


CPU = Device("cpu", "cpu")
CUDA = Device("cuda", "a device")
NPU = Device("npu", "a device")


def test_a_device_has_an_index_and_a_library() -> None:
    assert Device("cuda", "a device", index=3).torch_device == torch.device("cuda", 3)
    assert Device("cpu", "cpu", index=3).torch_device == torch.device("cpu")
    assert [each.collectives for each in (CPU, CUDA, NPU)] == ["gloo", "nccl", "hccl"]


def test_a_device_beyond_the_last_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(DeviceUnavailable, match="cuda device 2, and there are 2 here"):
        pick_device("cuda", threads=1, index=2)


def test_a_device_counts_as_lost_without_the_other_ranks() -> None:
    error = RanksLost("A rank can do nothing more.")
    assert all(each.is_lost(error) for each in (CPU, CUDA, NPU))


def test_the_cpu_allocators_own_error_is_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    assert CPU.is_out_of_memory(caught.value)
    assert not CPU.is_lost(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        MemoryError(),
        RuntimeError("NPU out of memory. Tried to allocate 52.00 MiB (NPU 0; 60.96 GiB total"),
        RuntimeError("NPU out of memory. NPUWorkspaceAllocator tried to allocate 1.89 GiB(NPU 7"),
        RuntimeError("EL0004: Failed to allocate memory."),
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_every_wording_of_a_full_device_is_known_and_the_device_is_not_lost(
    error: Exception,
) -> None:
    for device in (CPU, CUDA, NPU):
        assert device.is_out_of_memory(error)
        assert not device.is_lost(error)


@pytest.mark.parametrize("error", [RuntimeError("shape mismatch"), ValueError("out of memory")])
def test_other_errors_are_neither(error: Exception) -> None:
    for device in (CPU, CUDA, NPU):
        assert not device.is_out_of_memory(error)
        assert not device.is_lost(error)


def test_a_device_that_is_lost_to_the_process() -> None:
    illegal = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    inner = RuntimeError(
        "The Inner error is reported as above. The process exits for this inner error, and the "
        "current working operator name is aclnnMul."
    )
    assert CUDA.is_lost(illegal)
    assert NPU.is_lost(inner)
    assert not CPU.is_lost(illegal)
    assert not CUDA.is_lost(inner)


def test_the_cpu_has_no_cache_but_garbage() -> None:
    CPU.empty_cache()
