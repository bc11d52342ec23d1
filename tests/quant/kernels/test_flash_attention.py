"""FlashAttention-3: where it is found, what it is called with, and what runs without it.

The function itself runs on Hopper GPUs only (`test_on_cuda.py`). Here a module of torch's attention
stands in for it, with the same signature and the same dtypes.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from quant.errors import ConversionError
from quant.kernels import selection
from quant.kernels.eager import EagerKernels, fp8_attention
from quant.kernels.flash_attention import MODULES, FlashAttention, load_flash_attention
from quant.kernels.interface import AttentionScales, Kernels
from quant.kernels.selection import pick_kernels
from quant.numerics.metrics import sqnr_db

SCALES = AttentionScales(0.125, 0.25, 0.5)
HEADS = 2
GPU = torch.device("cuda", 0)


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
) -> Tensor:
    """Compute what FlashAttention-3 does: [B, S, heads, D], E4M3 with descales or BF16 → BF16."""
    inputs = []
    for x, descale in ((q, q_descale), (k, k_descale), (v, v_descale)):
        assert (x.dtype == torch.float8_e4m3fn) == (descale is not None)
        if descale is not None:
            assert descale.shape == (x.shape[0], x.shape[2])
            assert descale.dtype == torch.float32
            x = (x.float() * descale[:, None, :, None]).to(torch.bfloat16)  # noqa: PLW2901
        inputs.append(x.transpose(1, 2))
    attend: Any = scaled_dot_product_attention if q_descale is None else fp8_attention
    attended: Tensor = attend(*inputs).transpose(1, 2)
    return attended


def flash_module(name: str, function: Any = flash_attn_func) -> ModuleType:
    module = ModuleType(name)
    module.flash_attn_func = function  # type: ignore[attr-defined]
    return module


@pytest.fixture(autouse=True)
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in MODULES:
        monkeypatch.setitem(sys.modules, name, None)


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(torch.bfloat16)


def qkv(tokens: int = 40) -> list[Tensor]:
    return [randn(1, tokens, HEADS, 32, seed=seed) for seed in range(3)]


def cuda_kernels(flash: FlashAttention | None) -> Kernels:
    kernels: Kernels = importlib.import_module("quant.kernels.cuda").CudaKernels(flash)
    return kernels


def test_the_authors_own_is_taken_first(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModuleNotFoundError, match=r"not installed \(the extra `cuda` has it\)"):
        load_flash_attention()
    q, k, v = qkv()
    monkeypatch.setitem(
        sys.modules, "fa3_fwd_interface", flash_module("fa3_fwd_interface", lambda q, k, v: q)
    )
    assert load_flash_attention().bf16(q, k, v) is q
    monkeypatch.setitem(
        sys.modules, "flash_attn_interface", flash_module("flash_attn_interface", lambda q, k, v: k)
    )
    assert load_flash_attention().bf16(q, k, v) is k


def test_one_that_is_installed_and_does_not_load_is_not_passed_over(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    (tmp_path / "flash_attn_interface.py").write_text("import a_library_it_needs\n")
    monkeypatch.delitem(sys.modules, "flash_attn_interface")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "fa3_fwd_interface", flash_module("fa3_fwd_interface"))
    with pytest.raises(ModuleNotFoundError, match="a_library_it_needs"):
        load_flash_attention()


def test_builds_that_also_return_the_softmax_sums_are_understood() -> None:
    q, k, v = qkv()
    assert FlashAttention(lambda q, k, v: (q, None)).bf16(q, k, v) is q


@pytest.mark.parametrize("act_scale", [None, 0.25])
@pytest.mark.parametrize("scales", [None, SCALES])
def test_the_kernels_attend_as_the_emulation_does(
    scales: AttentionScales | None, act_scale: float | None
) -> None:
    kernels, eager = cuda_kernels(FlashAttention(flash_attn_func)), EagerKernels()
    inputs, emulated = qkv(), qkv()
    if scales is not None:
        each_scale = (scales.q, scales.k, scales.v)
        inputs = [kernels.round_act(*each) for each in zip(inputs, each_scale, strict=True)]
        emulated = [eager.round_act(*each) for each in zip(emulated, each_scale, strict=True)]
    found = kernels.attention(inputs[0], inputs[1], inputs[2], scales, act_scale)
    expected = eager.attention(emulated[0], emulated[1], emulated[2], scales, act_scale)
    assert found.shape == expected.shape == (1, 40, HEADS * 32)
    assert found.element_size() == (2 if act_scale is None else 1)
    assert sqnr_db(expected, found.float() * (act_scale or 1.0)) > 30


def test_without_it_torch_attends_in_bf16() -> None:
    q, k, v = qkv()
    found = cuda_kernels(None).attention(q, k[:, :7], v[:, :7], None, None)
    assert torch.equal(found, EagerKernels().attention(q, k[:, :7], v[:, :7], None, None))


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Describe a Hopper GPU; kernels are tried with attention on the CPU alone."""

    def check(kernels: Kernels, *, fp8_attention: bool = False, **_: Any) -> None:
        q, k, v = qkv()
        kernels.attention(q, k, v, None, None)
        if fp8_attention:
            codes = [kernels.round_act(x, 0.25) for x in (q, k, v)]
            kernels.attention(codes[0], codes[1], codes[2], SCALES, 0.25)

    monkeypatch.setattr(selection, "check_kernels", check)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


@pytest.mark.parametrize("fp8_attention", [False, True])
@pytest.mark.usefixtures("hopper")
def test_a_hopper_gpu_takes_it(monkeypatch: pytest.MonkeyPatch, fp8_attention: bool) -> None:
    monkeypatch.setitem(sys.modules, MODULES[1], flash_module(MODULES[1]))
    choice = pick_kernels(GPU, quantized=True, fp8_attention=fp8_attention)
    assert (choice.kernels.name, choice.warning) == ("cuda with FlashAttention-3", None)


def refuse(*_: Tensor, **__: Tensor) -> Tensor:
    raise RuntimeError("head_size should be a multiple of 8")


@pytest.mark.parametrize(
    ("function", "reason"),
    [(None, "not installed"), (refuse, "head_size should be a multiple of 8")],
)
@pytest.mark.usefixtures("hopper")
def test_where_it_is_missing_or_broken_torch_attends_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, function: Any, reason: str
) -> None:
    if function is not None:
        monkeypatch.setitem(sys.modules, MODULES[1], flash_module(MODULES[1], function))
    choice = pick_kernels(GPU, quantized=True)
    assert choice.kernels.name == "cuda"
    assert choice.warning is not None
    assert choice.warning.startswith("FlashAttention-3 does not run on Some GPU (")
    assert reason in choice.warning
    assert choice.warning.endswith("; torch's attention runs instead, which is slower.")
    with pytest.raises(ConversionError, match=f"FP8 attention does not run here: .*{reason}"):
        pick_kernels(GPU, quantized=True, fp8_attention=True)


@pytest.mark.parametrize("capability", [(8, 9), (10, 0), (12, 0)])
@pytest.mark.usefixtures("hopper")
def test_other_gpus_have_torchs_attention_without_a_warning(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]
) -> None:
    monkeypatch.setitem(sys.modules, MODULES[1], flash_module(MODULES[1]))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    choice = pick_kernels(GPU, quantized=True)
    assert (choice.kernels.name, choice.warning) == ("cuda", None)
    with pytest.raises(ConversionError, match="written for Hopper GPUs, not for Some GPU"):
        pick_kernels(GPU, quantized=True, fp8_attention=True)
