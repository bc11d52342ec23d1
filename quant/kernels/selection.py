"""Choose the kernels of a device and test them before use.

Kernels are compiled on the machine that runs them, by libraries that may be missing and for GPUs
that may lack a feature. Each set of kernels is therefore run on small tensors and compared with
plain torch before it is used (`quant.kernels.self_test`). If it fails, the choice carries a warning
and plain torch runs instead; if only FlashAttention-3 fails, torch's attention does; if only sparse
attention fails, it is emulated. On an Ascend NPU there are several sets, and the first that passes
is taken.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from typing import Any

import torch

from quant import ascend
from quant.device import backend
from quant.errors import ConversionError
from quant.kernels.eager import EagerKernels
from quant.kernels.flash_attention import HOPPER, FlashAttention, load_flash_attention
from quant.kernels.interface import Kernels
from quant.kernels.self_test import BlockShape, check_int8, check_kernels, check_sparse

logger = logging.getLogger(__name__)

FP8_CAPABILITY = (8, 9)
"""The lowest compute capability with tensor cores that multiply E4M3."""


def multiplies_fp8(device: torch.device) -> bool:
    """Return whether the device's tensor cores multiply E4M3."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= FP8_CAPABILITY


def multiplies_codes(device: torch.device) -> bool:
    """Return whether quantized products are in 8 bits; otherwise in BF16, of decoded weights."""
    if device.type != "npu":
        return multiplies_fp8(device)
    # Needs torch_npu.
    from quant.kernels.ascend_native import converts_hifloat8  # noqa: PLC0415

    return converts_hifloat8(device)


@dataclass(frozen=True, slots=True)
class KernelChoice:
    """The kernels to run on, and a warning if they are not the fastest for the device."""

    kernels: Kernels
    warning: str | None = None


def pick_kernels(  # noqa: PLR0913 (what a mode may need)
    device: torch.device,
    *,
    quantized: bool,
    shape: BlockShape | None = None,
    per_row_scales: bool = False,
    fp8_attention: bool = False,
    int8: bool = False,
    sparse_block: int | None = None,
) -> KernelChoice:
    """Choose the kernels of a mode on `device`: plain torch if nothing better runs.

    Args:
        quantized: whether the mode multiplies HiFloat8, which not every GPU does in 8 bits.
        shape: shape of the model's blocks; kernels that depend on it are then compiled here.
        per_row_scales: whether products may have a scale for each row (`QuantRecipe`).
        fp8_attention: whether self-attention is in FP8, which needs FlashAttention-3.
        int8: whether the mode multiplies INT8, on blocks that are otherwise in BF16.
        sparse_block: tokens of a block of sparse attention, if the mode has it.

    Raises:
        ConversionError: FP8 attention does not run on this device.
    """
    check = partial(_check, device=device, int8=int8, quantized=quantized, shape=shape)
    check_all = partial(check, per_row_scales=per_row_scales)
    if device.type == "cuda":
        choice = _pick_on_cuda(
            device, check, check_all, quantized=quantized, fp8_attention=fp8_attention
        )
        return choice if sparse_block is None else _add_sparse(choice, device, sparse_block, shape)
    if device.type == "npu":
        if fp8_attention:
            raise _no_fp8_attention("there are no kernels of it for Ascend NPUs")
        return _pick_on_npu(device, check_all, quantized=quantized)
    return KernelChoice(EagerKernels())


def _pick_on_cuda(
    device: torch.device,
    check: Callable[..., None],
    check_all: Callable[[Kernels], None],
    *,
    quantized: bool,
    fp8_attention: bool,
) -> KernelChoice:
    """Choose the kernels of a mode on an NVIDIA GPU.

    Args:
        check: checks kernels; takes whether FP8 attention is checked as well.
        check_all: checks kernels with all forms of products.
    """
    name = torch.cuda.get_device_name(device)
    if quantized and not multiplies_fp8(device):
        major, minor = torch.cuda.get_device_capability(device)
        reason = (
            f"{name} (compute capability {major}.{minor}) has no FP8 tensor cores, which begin "
            "with 8.9"
        )
        if fp8_attention:
            raise _no_fp8_attention(reason)
        return KernelChoice(
            EagerKernels(),
            f"{reason}: quantized modes are emulated. They save memory, and take longer than "
            "bf16, because every weight is decoded to BF16 for every product.",
        )
    fused = _try(_cuda_kernels, check_all)
    if isinstance(fused, str):
        reason = f"the kernels for {name} do not run ({fused})"
        if fp8_attention:
            raise _no_fp8_attention(reason)
        return KernelChoice(
            EagerKernels(),
            f"{reason[0].upper()}{reason[1:]}; plain torch runs instead, which is slower, in "
            "quantized modes slower than bf16.",
        )
    if torch.cuda.get_device_capability(device)[0] != HOPPER:
        if fp8_attention:
            raise _no_fp8_attention(f"FlashAttention-3 is written for Hopper GPUs, not for {name}")
        return KernelChoice(fused)
    flash = _try(
        lambda: _cuda_kernels(load_flash_attention()), partial(check, fp8_attention=fp8_attention)
    )
    if isinstance(flash, str):
        reason = f"FlashAttention-3 does not run on {name} ({flash})"
        if fp8_attention:
            raise _no_fp8_attention(reason)
        return KernelChoice(fused, f"{reason}; torch's attention runs instead, which is slower.")
    return KernelChoice(flash)


def emulate_sparse(choice: KernelChoice, reason: str | None = None) -> KernelChoice:
    """Warn that sparse attention takes more time than dense, since all kernels can emulate it."""
    because = "" if reason is None else f", because its kernel does not run ({reason})"
    slow = f"Sparse attention is emulated in plain torch{because}: slower than dense attention."
    return replace(choice, warning=" ".join(filter(None, (choice.warning, slow))))


def _add_sparse(
    choice: KernelChoice, device: torch.device, block: int, shape: BlockShape | None
) -> KernelChoice:
    """Take the kernel for sparse attention if it runs; plain torch's kernels only emulate it."""
    if isinstance(choice.kernels, EagerKernels):
        return emulate_sparse(choice)
    sparse = _try(
        partial(_sparse_kernels, choice.kernels),
        partial(check_sparse, device=device, block=block, shape=shape),
    )
    if isinstance(sparse, str):
        return emulate_sparse(choice, sparse)
    return replace(choice, kernels=sparse)


def _check(kernels: Kernels, device: torch.device, int8: bool, **settings: Any) -> None:
    check_kernels(kernels, device=device, **settings)
    if int8:
        check_int8(kernels, device)


def _pick_on_npu(
    device: torch.device, check: Callable[[Kernels], None], *, quantized: bool
) -> KernelChoice:
    """Choose the first kernels for Ascend that pass their check, the fastest first."""
    name = backend("npu").get_device_name(device)
    if quantized:
        native = _try(lambda: _ascend_kernels("native", device), check)
        if not isinstance(native, str):
            return KernelChoice(native)
        logger.info("%s does not multiply HiFloat8 (%s)", name, native)
    triton = _try(lambda: _ascend_kernels("triton", device), check)
    if not isinstance(triton, str):
        return KernelChoice(triton)
    plain = _try(lambda: _ascend_kernels("plain", device), check)
    if isinstance(plain, str):
        return KernelChoice(
            EagerKernels(),
            f"The kernels for {name} do not run ({plain}); plain torch runs instead, which is "
            "slower, in quantized modes slower than bf16.",
        )
    if not quantized:
        logger.info("%s runs without Triton kernels (%s)", name, triton)
        return KernelChoice(plain)
    return KernelChoice(
        plain,
        f"{name} multiplies no HiFloat8, and the Triton kernels that round and decode it do not "
        f"run ({triton}): quantized modes save memory, and take longer than bf16.",
    )


_ASCEND_KERNELS = {
    "native": ("quant.kernels.ascend_native", "NativeHif8Kernels"),
    "triton": ("quant.kernels.ascend_triton", "AscendTritonKernels"),
    "plain": ("quant.kernels.ascend", "AscendKernels"),
}


def _ascend_kernels(which: str, device: torch.device) -> Kernels:
    # By name, because each needs a library that may be missing.
    module, kernels = _ASCEND_KERNELS[which]
    loaded: Kernels = getattr(import_module(module), kernels).load(device)
    return loaded


def _cuda_kernels(flash: FlashAttention | None = None) -> Kernels:
    # Needs Triton, which machines without a GPU do not have.
    from quant.kernels.cuda import CudaKernels  # noqa: PLC0415

    return CudaKernels(flash)


def _sparse_kernels(kernels: Kernels) -> Kernels:
    from quant.kernels.cuda import CudaKernels  # noqa: PLC0415 (as above)

    assert isinstance(kernels, CudaKernels)
    return CudaKernels(kernels.flash, sparse=True)


def _try(make: Callable[[], Kernels], check: Callable[[Kernels], None]) -> Kernels | str:
    """Return the kernels if they load and pass their check, otherwise the reason."""
    try:
        kernels = make()
        check(kernels)
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise  # not caused by the kernels
    except Exception as error:
        if ascend.says_full(error) or ascend.says_lost(error):
            raise  # the same, of torch_npu, which has no class for it
        # Compilers and drivers raise many kinds of exceptions; the model can run after any of them.
        logger.debug("kernels do not run", exc_info=True)
        return _reason(error)
    return kernels


def _no_fp8_attention(reason: str) -> ConversionError:
    """Build the error; FP8 attention has no fallback on a GPU (docs/decisions/016)."""
    return ConversionError(
        f"FP8 attention does not run here: {reason}; take a recipe with attention 'bf16'"
    )


def _reason(error: Exception) -> str:
    """Return the last line of the message: compilers put the location first and the cause last."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [""]
    return f"{type(error).__name__}: {lines[-1].strip()}"[:300]
