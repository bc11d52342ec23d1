"""Select the device and hide the differences between CPU, CUDA and Ascend NPU.

No other module of the worker asks which device it runs on. `torch.cuda` and `torch.npu` have the
same functions, so one code path serves both; the CPU has no such module and needs none
(`quant.device`). Kernels that differ per device are in `quant/kernels/`.
"""

from __future__ import annotations

import gc
import importlib.util
import logging
import os
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist

from quant import ascend
from quant.device import ACCELERATORS, backend, configure, unavailable_reason
from quant.kernels.eager import EagerKernels
from quant.kernels.selection import (
    KernelChoice,
    emulate_sparse,
    multiplies_codes,
    pick_kernels,
)
from quant.kernels.self_test import BlockShape
from worker.errors import DeviceUnavailable, RanksLost
from worker.interface import DeviceMemory
from worker.settings import DeviceChoice

logger = logging.getLogger(__name__)

DeviceKind = Literal["cpu", "cuda", "npu"]

# diffusers' fused attention for Ascend; on other devices torch's own dispatch is right.
_NPU_ATTENTION = "_native_npu"

# Not every allocator raises torch.OutOfMemoryError. torch's CPU allocator raises RuntimeError; so
# did torch_npu's until recently, and its workspace allocator still does. The CUDA lines come from
# libraries that allocate without torch.
_OOM_MESSAGES = (
    "DefaultCPUAllocator: ",
    "std::bad_alloc",
    "NPU out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether `error` means that the device's or the host's memory is exhausted."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    return any(mark in str(error) for mark in _OOM_MESSAGES) or ascend.says_full(error)


def is_lost(error: BaseException, kinds: Collection[DeviceKind] = ("cuda", "npu")) -> bool:
    """Return whether a device of `kinds` is unusable in this process after `error`.

    An error of CUDA's runtime (an illegal access, a failed assertion) persists for the life of the
    process, and so does one of Ascend's internal errors (`quant/ascend.py`). After an error of NCCL
    or HCCL the ranks no longer agree on what was exchanged. Out of memory is none of these.
    """
    if is_out_of_memory(error):
        return False
    if isinstance(error, RanksLost):
        return True
    if kinds and isinstance(error, dist.DistBackendError):
        return True
    if "cuda" in kinds and isinstance(error, torch.AcceleratorError):
        return True
    return "npu" in kinds and isinstance(error, RuntimeError) and ascend.says_lost(error)


@dataclass(frozen=True, slots=True)
class Device:
    """One device; `kind` is resolved and never "auto"."""

    kind: DeviceKind
    name: str

    # The transformer and the text encoder run in `dtype` on every device. The VAE runs in float32:
    # it is small, its precision shows in the frames, and its BF16 convolutions fail on Ascend 910B
    # (CANN 8.5).
    dtype: torch.dtype = torch.bfloat16
    vae_dtype: torch.dtype = torch.float32

    # Which of several devices. Calls that depend on it name it, because each new thread's current
    # device is the first one.
    index: int = 0

    @property
    def torch_device(self) -> torch.device:
        return torch.device("cpu") if self.kind == "cpu" else torch.device(self.kind, self.index)

    @property
    def collectives(self) -> str:
        """The `torch.distributed` backend to exchange tensors between devices of this kind."""
        return {"cpu": "gloo", "cuda": "nccl", "npu": "hccl"}[self.kind]

    @property
    def attention_backend(self) -> str | None:
        """The attention backend for blocks that stay diffusers' own; None keeps its default."""
        return _NPU_ATTENTION if self.kind == "npu" else None

    def pick_kernels(  # noqa: PLR0913 (what a mode may need)
        self,
        *,
        quantized: bool,
        shape: BlockShape | None = None,
        per_row_scales: bool = False,
        fp8_attention: bool = False,
        int8: bool = False,
        sparse_block: int | None = None,
        emulate: bool = False,
    ) -> KernelChoice:
        """Choose the kernels for a mode's blocks.

        Args:
            quantized, shape, per_row_scales, fp8_attention, int8, sparse_block: as in
                `quant.kernels.selection.pick_kernels`.
            emulate: run quantized products in plain torch even if the device has kernels for them.

        Raises:
            ConversionError: FP8 attention does not run on this device.
        """
        if emulate and (quantized or int8):
            eager = KernelChoice(EagerKernels())
            return eager if sparse_block is None or self.kind == "cpu" else emulate_sparse(eager)
        return pick_kernels(
            self.torch_device,
            quantized=quantized,
            shape=shape,
            per_row_scales=per_row_scales,
            fp8_attention=fp8_attention,
            int8=int8,
            sparse_block=sparse_block,
        )

    @property
    def attends_otherwise(self) -> bool:
        """Whether FP8 and sparse attention run here, at least emulated.

        An NPU does not know E4M3, and no kernel of it for sparse attention was tried.
        """
        return self.kind != "npu"

    @property
    def emulates(self) -> bool:
        """Whether quantized modes run in BF16 on this accelerator; False on the CPU.

        They then take the memory of decoded weights and of BF16 activations.
        """
        return self.kind != "cpu" and not multiplies_codes(self.torch_device)

    @property
    def multiplies_codes(self) -> bool:
        """Whether quantized products are in 8 bits here; otherwise in BF16, of decoded weights."""
        return multiplies_codes(self.torch_device)

    def synchronize(self) -> None:
        """Wait for the device's queued work, so that timings and progress are right."""
        if self.kind != "cpu":
            backend(self.kind).synchronize(self.index)

    def is_out_of_memory(self, error: BaseException) -> bool:
        """Return whether `error` means that the device's or the host's memory is exhausted."""
        return is_out_of_memory(error)

    def is_lost(self, error: BaseException) -> bool:
        """Return whether the device is unusable in this process after `error`."""
        return is_lost(error, () if self.kind == "cpu" else (self.kind,))

    def empty_cache(self) -> None:
        """Free unreferenced memory; call it when the stack frames of the failed job are gone.

        torch caches freed device memory, in pieces that may be too small for the next request.
        """
        gc.collect()
        if self.kind != "cpu":
            backend(self.kind).empty_cache()

    def available_bytes(self) -> int | None:
        """Return the bytes of device memory that this process may still use; None on the CPU."""
        if self.kind == "cpu":
            return None
        module = backend(self.kind)
        free, _ = module.mem_get_info(self.index)
        return int(free) + int(module.memory_reserved(self.index))

    def memory(self) -> DeviceMemory | None:
        """Read the device's memory figures; None on the CPU."""
        if self.kind == "cpu":
            return None
        module = backend(self.kind)
        return DeviceMemory(
            allocated_bytes=int(module.memory_allocated(self.index)),
            peak_bytes=int(module.max_memory_allocated(self.index)),
            total_bytes=int(module.mem_get_info(self.index)[1]),
        )


def pick_device(wanted: DeviceChoice, threads: int | None = None, index: int = 0) -> Device:
    """Resolve `wanted`, and have torch use `threads` CPU threads (default: every usable core).

    "auto" is npu if `torch_npu` imports and finds a device, else cuda if there is one, else cpu.

    Args:
        index: which of several devices, counted from 0; it becomes the process' current device.

    Raises:
        DeviceUnavailable: `wanted` is not usable here, or there is no device `index`.
    """
    torch.set_num_threads(threads or usable_cores())
    kind = _first_usable() if wanted == "auto" else wanted
    if kind == "cpu":
        used = torch.get_num_threads()
        return Device("cpu", f"cpu, {used} thread{'' if used == 1 else 's'}")
    reason = unavailable_reason(kind)
    if reason is not None:
        raise DeviceUnavailable(
            f"WORKER_DEVICE is {kind!r}, but {reason}. Set it to 'auto' to take what is there."
        )
    count = backend(kind).device_count()
    if index >= count:
        raise DeviceUnavailable(
            f"This process is to work on {kind} device {index}, and there are {count} here, "
            "counted from 0; start as many processes as there are devices (torchrun "
            "--nproc-per-node)."
        )
    try:
        configure(kind)
        backend(kind).set_device(index)
        name = str(backend(kind).get_device_name(index))
    except RuntimeError as error:
        if kind == "npu":
            raise DeviceUnavailable(
                f"{kind} device {index}: {ascend.start_problem(error)}."
            ) from error
        raise
    return Device(kind, name, index=index)


def _first_usable() -> DeviceKind:
    """Return the first kind of accelerator that can be used, or cpu."""
    reasons = {}
    for kind in ACCELERATORS:
        reason = unavailable_reason(kind)
        if reason is None:
            return kind
        reasons[kind] = reason
    if importlib.util.find_spec("torch_npu") is not None:
        # Who installs it has a card. Its model would crawl on the CPU, and nobody would know why.
        logger.warning("the worker runs on the CPU, because %s", reasons["npu"])
    return "cpu"


def usable_cores() -> int:
    """Count the cores this process may use; in a container fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
