"""Test which device is picked and what it reports, on a machine that has only a CPU."""

import importlib.util
import os
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from quant import ascend
from worker.device import Device, is_lost, pick_device, usable_cores
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


PTA = "\n[ERROR] 2025-11-18-09:33:13 (PID:42, Device:0, RankID:-1) ERR00100 PTA call acl api failed"
TORCH_NPU = "build/CMakeFiles/torch_npu.dir/compiler_depend.ts:523 NPU function error: "

LOST_ON_NPU = {
    "a core stopped": f"synchronize:{TORCH_NPU}AclrtSynchronizeStreamWithTimeout(stream()), error "
    f"code is 507011{PTA}\n[Error]: The model stream execute failed.",
    "a vector core stopped": f"operator():{TORCH_NPU}AclrtSynchronizeStreamWithTimeout(copy_stream)"
    f", error code is 507035{PTA}",
    "a task of HCCL timed out": f"npuSynchronizeDevice:{TORCH_NPU}AclrtSynchronizeDeviceWithTimeout"
    f", error code is 507048{PTA}\nEI0002: The wait execution of the Notify register times out.",
    "the driver failed": f"npuSynchronizeDevice:{TORCH_NPU}aclrtSynchronizeDevice, error code is "
    f"507899{PTA}\nEL9999: driver error:internal error",
    "an event timed out": f"synchronize:{TORCH_NPU}aclrtSynchronizeEvent(event_), error code is "
    f"107020{PTA}",
    "ACL's own words": "EZ9999: Inner Error!\n wait for compute device to finish failed, runtime "
    "result = 507015.[FUNC:ReportCallError]",
    "without a code": "ACL stream synchronize failed.\nEI9999: Inner Error!\nhccl fftsplus task "
    "timeout occurred during task execution, stream_id:5",
    "the task queue stopped": "The Inner error is reported as above. The process exits for this "
    "inner error, and the current working operator name is aclnnMul.",
    "memory is broken": f"getRepoStopFlag in Run, throw UCE ERROR.{PTA}",
    "many bits of memory are wrong": "HBM MULTI BIT ECC ERROR. reason=hbm Multi-bit ECC error",
    "it was stopped from outside": "force_stop_error_flag is true when workEnqueue, throw FORCE "
    "STOP.",
    "HCCL did not connect": "create:build/CMakeFiles/torch_npu.dir/compiler_depend.ts:89 HCCL "
    "function error: HcclCommInitRootInfo(numRanks, &rootInfo, rank, &(comm->hcclComm_)), error "
    "code is 4\n ERR02200 DIST call hccl api failed.",
    "HCCL did not hear from a rank": "InnerRunOpApi:torch_npu/csrc/framework/OpParamMaker.cpp:281 "
    "OPS function error: HcclAllreduce, error code is 6\nEI0006: Getting socket times out.",
    "the last process still runs": "[ERROR] HCCL error in: torch_npu/csrc/distributed/"
    "ProcessGroupHCCL.cpp:64\nEJ0001: Failed to initialize the HCCP process.",
}

FINE_ON_NPU = {
    "a wrong argument": "call aclnnCast failed, detail:EZ1001: dtype of input is not supported, "
    "error code is 161002",
    "a number like a code": "The size of tensor a (507015) must match the size of tensor b (5120)",
    "full": f"{TORCH_NPU}aclrtMalloc, error code is 207001{PTA}\nEL0004: Failed to allocate.",
    "full, without words": f"{TORCH_NPU}aclrtMallocPhysical, error code is 207018{PTA}",
}


@pytest.mark.parametrize("what", LOST_ON_NPU)
def test_an_ascend_card_that_is_lost_is_known_by_its_words(what: str) -> None:
    error = RuntimeError(LOST_ON_NPU[what])
    assert NPU.is_lost(error)
    assert is_lost(error), "at the start, where the kind of device may not be known"
    assert not NPU.is_out_of_memory(error)
    assert not CPU.is_lost(error)
    assert not CUDA.is_lost(error)


@pytest.mark.parametrize("what", FINE_ON_NPU)
def test_other_errors_of_an_ascend_card_leave_it_usable(what: str) -> None:
    error = RuntimeError(FINE_ON_NPU[what])
    assert not NPU.is_lost(error)
    assert NPU.is_out_of_memory(error) == what.startswith("full")


def test_an_nvidia_card_is_lost_by_every_error_of_its_runtime() -> None:
    illegal = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    assert CUDA.is_lost(illegal)
    assert is_lost(illegal)
    assert not CPU.is_lost(illegal)


def test_an_error_between_the_cards_takes_the_card_with_it() -> None:
    error = dist.DistBackendError("NCCL error in: ProcessGroupNCCL.cpp:3690, unhandled cuda error")
    assert CUDA.is_lost(error)
    assert NPU.is_lost(error)
    assert not CPU.is_lost(error)


def test_the_cpu_has_no_cache_but_garbage() -> None:
    CPU.empty_cache()


class Option:
    """A group of options of `torch.npu`, which change something when they are set."""

    allow_hf32 = True
    allow_internal_format = True


def npu_module(*, count: int = 1, start: Exception | None = None) -> SimpleNamespace:
    """A `torch.npu` with the functions that the choice of a device calls."""

    def set_device(_index: int) -> None:
        if start is not None:
            raise start

    return SimpleNamespace(
        is_available=lambda: count > 0,
        device_count=lambda: count,
        set_device=set_device,
        get_device_name=lambda _index: "Ascend910B2",
        conv=Option(),
        matmul=Option(),
        config=Option(),
    )


def install(monkeypatch: pytest.MonkeyPatch, module: SimpleNamespace) -> None:
    monkeypatch.setattr(torch, "npu", module, raising=False)
    monkeypatch.setattr(ascend, "import_problem", lambda: None)


def test_on_an_ascend_card_float32_is_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    module = npu_module()
    install(monkeypatch, module)
    device = pick_device("npu", threads=1)
    assert (device.kind, device.name) == ("npu", "Ascend910B2")
    assert not module.conv.allow_hf32
    assert not module.matmul.allow_hf32
    assert not module.config.allow_internal_format


def test_a_card_that_does_not_start_is_refused_with_what_may_hold_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    error = RuntimeError(f"{TORCH_NPU}c10_npu::SetDevice(device_id_), error code is 507033{PTA}")
    install(monkeypatch, npu_module(start=error))
    with pytest.raises(
        DeviceUnavailable, match=r"507033\): another container may hold it.*npu-smi"
    ):
        pick_device("npu", threads=1)


def test_auto_says_why_an_installed_torch_npu_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(ascend, "import_problem", lambda: "CANN is not there")
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: name if name == "torch_npu" else found(name)
    )
    assert pick_device("auto", threads=1).kind == "cpu"
    assert "the worker runs on the CPU, because CANN is not there" in caplog.text
