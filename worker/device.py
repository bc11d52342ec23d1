"""The only place in the worker that asks which device it runs on.

CUDA and Ascend (`torch_npu`) mirror each other's module, so one code path serves both; the CPU has
none and needs none (`quant.device`). Kernels that differ per device live in
`quant/kernels/`, not here.
"""

from __future__ import annotations

import gc
import os
from dataclasses import dataclass
from typing import Literal

import torch

from quant.device import ACCELERATORS, backend, why_not
from quant.kernels.eager import EagerKernels
from quant.kernels.selection import KernelChoice, multiplies_fp8, pick_kernels
from quant.kernels.self_test import BlockShape
from worker.errors import DeviceUnavailable, RanksLost
from worker.interface import DeviceMemory
from worker.settings import DeviceChoice

DeviceKind = Literal["cpu", "cuda", "npu"]

# diffusers' fused attention for Ascend; elsewhere torch's own dispatch is the right default.
_NPU_ATTENTION = "_native_npu"

# Not every allocator raises torch.OutOfMemoryError: torch's CPU allocator raises RuntimeError, and
# so did torch_npu's until lately, and its allocator of workspaces does still. EL0004 is CANN's code
# for memory that could not be had; the CUDA lines come from what allocates past torch.
_FULL = (
    "DefaultCPUAllocator: ",
    "std::bad_alloc",
    "NPU out of memory",
    "EL0004",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)

# torch_npu's queue of tasks stops for good with the first; what is given to it afterwards is not
# run, and no error says so. The others are a memory fault of the card, and a stop from outside.
_NPU_LOST = ("The process exits for this inner error", "UCE ERROR", "FORCE STOP")


@dataclass(frozen=True, slots=True)
class Device:
    """One device, resolved: `kind` is never "auto"."""

    kind: DeviceKind
    name: str

    # The transformer and the text encoder run in this type everywhere. The VAE stays in float32: it
    # is small, it decides the last bit of picture quality, and its BF16 convolutions fail on Ascend
    # 910B (CANN 8.5).
    dtype: torch.dtype = torch.bfloat16
    vae_dtype: torch.dtype = torch.float32

    # Which of several cards; named wherever it matters, because what a thread that was not told
    # works on is the first.
    card: int = 0

    @property
    def torch_device(self) -> torch.device:
        return torch.device("cpu") if self.kind == "cpu" else torch.device(self.kind, self.card)

    @property
    def collectives(self) -> str:
        """What `torch.distributed` calls the library that exchanges tensors between such cards."""
        return {"cpu": "gloo", "cuda": "nccl", "npu": "hccl"}[self.kind]

    @property
    def attention_backend(self) -> str | None:
        """The diffusers attention backend this device wants; None keeps diffusers' default."""
        return _NPU_ATTENTION if self.kind == "npu" else None

    def pick_kernels(
        self,
        *,
        quantized: bool,
        shape: BlockShape | None = None,
        scales_rows: bool = False,
        fp8_attention: bool = False,
        emulate: bool = False,
    ) -> KernelChoice | None:
        """The kernels for a mode's blocks; None where they stay as diffusers has them.

        Args:
            quantized, shape, scales_rows, fp8_attention: as `quant.kernels.selection.pick_kernels`
            has
                them.
            emulate: run quantized products in plain torch, bit-true on every device.
        """
        if self.kind == "npu":
            return None  # diffusers' blocks with the attention of `attention_backend`
        if emulate and quantized:
            return KernelChoice(EagerKernels())
        return pick_kernels(
            self.torch_device,
            quantized=quantized,
            shape=shape,
            scales_rows=scales_rows,
            fp8_attention=fp8_attention,
        )

    @property
    def emulates(self) -> bool:
        """Whether this is a card that runs quantized modes in plain torch."""
        return self.kind != "cpu" and not multiplies_fp8(self.torch_device)

    def synchronize(self) -> None:
        """Wait for the device, so that clocks and progress tell the truth."""
        if self.kind != "cpu":
            backend(self.kind).synchronize(self.card)

    def is_out_of_memory(self, error: BaseException) -> bool:
        """Whether `error` says that memory, the device's or the host's, could not be had."""
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            return True
        return isinstance(error, RuntimeError) and any(mark in str(error) for mark in _FULL)

    def is_lost(self, error: BaseException) -> bool:
        """Whether after `error` the device can do no more in this process, whatever it is asked.

        On CUDA an error of the runtime (an illegal access, a failed assertion) stays with the
        process. One that says the memory is full does not.
        """
        if self.is_out_of_memory(error):
            return False
        if isinstance(error, RanksLost):
            return True
        if self.kind == "cuda":
            return isinstance(error, torch.AcceleratorError)
        return self.kind == "npu" and any(mark in str(error) for mark in _NPU_LOST)

    def empty_cache(self) -> None:
        """Give back what nobody refers to any more; call it when the failed job's frames are gone.

        torch keeps freed device memory for itself, in pieces that may be too small for what failed.
        """
        gc.collect()
        if self.kind != "cpu":
            backend(self.kind).empty_cache()

    def available_bytes(self) -> int | None:
        """What this process may take of the device's memory; None on the CPU."""
        if self.kind == "cpu":
            return None
        module = backend(self.kind)
        free, _ = module.mem_get_info(self.card)
        return int(free) + int(module.memory_reserved(self.card))

    def memory(self) -> DeviceMemory | None:
        """The device's memory figures; None on the CPU."""
        if self.kind == "cpu":
            return None
        module = backend(self.kind)
        return DeviceMemory(
            allocated_bytes=int(module.memory_allocated(self.card)),
            peak_bytes=int(module.max_memory_allocated(self.card)),
            total_bytes=int(module.mem_get_info(self.card)[1]),
        )


def pick_device(wanted: DeviceChoice, threads: int | None = None, card: int = 0) -> Device:
    """Resolve `wanted`, and have torch use `threads` CPU threads (default: every usable core).

    "auto" is npu if `torch_npu` imports and finds a card, else cuda if there is one, else cpu.

    Args:
        card: which of several, counted from 0; the process works on it from here on.

    Raises:
        DeviceUnavailable: `wanted` names a device that is not usable here, or `card` is none.
    """
    torch.set_num_threads(threads or usable_cores())
    kind: DeviceKind
    if wanted == "auto":
        kind = next((each for each in ACCELERATORS if why_not(each) is None), "cpu")
    else:
        kind = wanted
    if kind == "cpu":
        return Device("cpu", f"cpu, {torch.get_num_threads()} threads")
    reason = why_not(kind)
    if reason is not None:
        raise DeviceUnavailable(
            f"WORKER_DEVICE is {kind!r}, but {reason}. Set it to 'auto' to take what is there."
        )
    if kind == "npu":
        # The private layouts trade precision for speed in strided views (`torch_npu` warns of it
        # itself).
        backend("npu").config.allow_internal_format = False
    count = backend(kind).device_count()
    if card >= count:
        raise DeviceUnavailable(
            f"This process is to work on {kind} card {card}, and there are {count} here, counted "
            "from 0; start as many processes as there are cards (torchrun --nproc-per-node)."
        )
    backend(kind).set_device(card)
    return Device(kind, str(backend(kind).get_device_name(card)), card=card)


def usable_cores() -> int:
    """The cores this process may run on, which in a container are fewer than the machine's."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
