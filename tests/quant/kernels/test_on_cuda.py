"""Tests that need a CUDA GPU.

Run them with `TRITON_INTERPRET=0 pytest -m cuda tests/quant/kernels/test_on_cuda.py`.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from quant.kernels.eager import EagerKernels
from quant.kernels.flash_attention import HOPPER
from quant.kernels.interface import AttentionScales
from quant.kernels.misfit_counter import CountingKernels
from quant.kernels.selection import pick_kernels
from quant.kernels.self_test import BlockShape
from quant.kernels.sparse.blocks import choose_blocks
from quant.numerics import hif8
from quant.numerics.int8 import token_scale
from quant.numerics.int8_linear import Int8Linear
from quant.numerics.metrics import sqnr_db
from quant.transformer.meta_model import load_weights
from quant.weights import header
from quant.weights.header import SMALL_BYTES, stored_tensors
from quant.weights.reader import BackgroundReader, TensorReader
from quant.weights.transfer import (
    BUFFERS,
    FastSafetensorsTransfer,
    ThreadTransfer,
    Transfer,
    fastsafetensors,
)
from quant.weights.writer import spec_of, split_into_shards, write_safetensors

pytestmark = pytest.mark.cuda

CUDA = torch.device("cuda", 0)
HOPPER_GPU = torch.cuda.is_available() and torch.cuda.get_device_capability(CUDA)[0] == HOPPER


@pytest.fixture(autouse=True, scope="module")
def compiled():
    """Check that Triton compiles; other tests use its interpreter."""
    assert os.environ.get("TRITON_INTERPRET", "0") == "0", "run it with TRITON_INTERPRET=0"


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    """Write tensors of many sizes and dtypes, in total much larger than the test's buffers."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{size}.{dtype}": torch.randn(size, generator=generator).to(dtype)
        for size in (0, 1, 7, 511, 9001, 70_001)
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    }
    path: Path = tmp_path_factory.mktemp("weights") / "many.safetensors"
    save_file(tensors, path)
    return path


def library_transfer() -> Transfer:
    threads = fastsafetensors(CUDA)
    assert threads is not None, "the extra `cuda` has the library"
    transfer = FastSafetensorsTransfer(CUDA, threads)
    transfer.chunk_bytes = 8192
    return transfer


def thread_transfer() -> Transfer:
    transfer = ThreadTransfer(CUDA)
    transfer.chunk_bytes = 8192
    return transfer


@pytest.fixture
def small_limit(monkeypatch):
    monkeypatch.setattr(header, "SMALL_BYTES", 400)


@pytest.mark.usefixtures("small_limit")
@pytest.mark.parametrize("transfer", [library_transfer, thread_transfer, None])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float32])
def test_every_tensor_arrives_on_the_device(file, dtype, transfer):
    stored = stored_tensors([file])
    assert file.stat().st_size > 4 * BUFFERS * 8192
    targets = {
        name: torch.full(s.shape, 77, dtype=dtype or s.dtype, device=CUDA)
        for name, s in stored.items()
    }
    with BackgroundReader(TensorReader(CUDA, transfer)) as reader:
        reader.read((stored[name], targets[name]) for name in stored)
    on_cpu = {name: torch.empty(s.shape, dtype=s.dtype) for name, s in stored.items()}
    TensorReader(torch.device("cpu")).read((stored[name], on_cpu[name]) for name in stored)
    for name, target in targets.items():
        assert torch.equal(target.cpu(), on_cpu[name].to(target.dtype)), name


@pytest.mark.parametrize("wide_first", [False, True])
@pytest.mark.usefixtures("small_limit")
@pytest.mark.parametrize("transfer", [library_transfer, thread_transfer, None])
def test_of_one_dtype_in_the_file_some_may_be_wanted_in_another(tmp_path, transfer, wide_first):
    """A transformer is stored in BF16, and some of its tensors run in FP32."""
    file = tmp_path / "bf16.safetensors"
    tensors = {f"{n:02}": torch.randn(100 + n).to(torch.bfloat16) for n in range(40)}
    save_file(tensors, file)
    dtypes = (torch.bfloat16, torch.float32)
    requests = [
        (s, torch.full(s.shape, 77.0, dtype=dtypes[(n + wide_first) % 2], device=CUDA))
        for n, s in enumerate(stored_tensors([file]).values())
    ]
    TensorReader(CUDA, transfer).read(requests)
    for stored, target in requests:
        assert torch.equal(target.cpu(), tensors[stored.name].to(target.dtype)), stored.name


class Layers(nn.Module):
    """Large tensors with small ones between them, on the meta device."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Linear(1024, 1024 * (1 + number % 3), device="meta", dtype=torch.bfloat16)
            for number in range(count)
        )


@pytest.mark.parametrize("transfer", [None, partial(ThreadTransfer, CUDA)])
def test_large_tensors_arrive_in_the_allocated_memory(tmp_path, monkeypatch, transfer):
    """Many tensors are loaded at once, into memory that earlier kernels still write to."""
    generator = torch.Generator().manual_seed(0)
    specs = [spec_of(name, tensor) for name, tensor in Layers(60).state_dict().items()]
    values = {
        name: torch.randn(shape, generator=generator).to(dtype) for name, dtype, shape in specs
    }
    for number, shard in enumerate(split_into_shards(specs, 100 << 20)):
        write_safetensors(tmp_path / f"{number}.safetensors", shard, {}, values.__getitem__)
    stored = stored_tensors(sorted(tmp_path.iterdir()))
    sizes: list[int] = []
    begin = FastSafetensorsTransfer.begin

    def recorded(library: FastSafetensorsTransfer, file: int, start: int, target: torch.Tensor):
        sizes.append(target.nbytes)
        return begin(library, file, start, target)

    monkeypatch.setattr(FastSafetensorsTransfer, "begin", recorded)
    torch.cuda.empty_cache()  # otherwise the first allocation reuses memory of other tests
    for _ in range(3):
        module = Layers(60)
        with BackgroundReader(TensorReader(CUDA, transfer)) as reader:
            load_weights(module, stored, reader)
        for name, tensor in module.state_dict().items():
            assert torch.equal(tensor.cpu(), values[name]), name
        torch.cuda._sleep(100_000_000)  # cycles: some 50 ms
        for tensor in module.state_dict().values():
            tensor.fill_(77)
        del module, tensor
    if transfer is not None:
        return
    assert fastsafetensors(CUDA) is not None, "the extra `cuda` has the library"
    assert sum(sizes) == 3 * sum(s.nbytes for s in stored.values() if s.nbytes >= SMALL_BYTES)


def test_the_device_runs_its_own_kernels():
    for rows in (False, True):
        for shape in (None, BlockShape(40, 5120, 13824), BlockShape(4, 128, 344)):
            choice = pick_kernels(
                CUDA, quantized=True, shape=shape, per_row_scales=rows, fp8_attention=HOPPER_GPU
            )
            name = "cuda with FlashAttention-3" if HOPPER_GPU else "cuda"
            assert (choice.kernels.name, choice.warning) == (name, None)


@torch.no_grad()
@pytest.mark.parametrize("width", [32, 64, 128])
@pytest.mark.parametrize(("tokens", "block"), [(2000, 128), (1920, 128), (1000, 64), (300, 16)])
def test_sparse_attention_is_its_emulation_and_may_be_recorded(tokens, block, width):
    shape = BlockShape(2, 2 * width, 256)
    choice = pick_kernels(CUDA, quantized=True, shape=shape, sparse_block=block)
    assert choice.warning is None
    assert choice.kernels.name.endswith("sparse attention")
    generator = torch.Generator(CUDA).manual_seed(0)
    drawn = torch.randn(3, 2, tokens, 2, width, device=CUDA, generator=generator)
    q, k, v = drawn.to(torch.bfloat16)
    kept = choose_blocks(q, k, block, 0.4)
    assert not kept.all()
    expected = EagerKernels().sparse_attention(q, k, v, kept, block, None)
    found = choice.kernels.sparse_attention(q, k, v, kept, block, None)
    assert sqnr_db(expected, found) > 40
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = choice.kernels.sparse_attention(q, k, v, kept, block, None)
    recorded.zero_()
    graph.replay()
    assert torch.equal(recorded, found)


def test_counting_changes_no_code_of_rotated_queries_and_keys():
    kernels = pick_kernels(CUDA, quantized=True).kernels
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(1, 50, 3 * 256, generator=generator).to(CUDA, torch.bfloat16)
    norm = nn.RMSNorm(256, eps=1e-6).to(CUDA, torch.bfloat16)
    angles = torch.rand(1, 50, 1, 128, generator=generator).to(CUDA)
    arguments = (qkv, norm, norm, (angles.cos(), angles.sin()), 2, AttentionScales(0.1, 0.2, 0.3))
    with torch.no_grad():
        expected = kernels.norm_rope(*arguments)
        counted = CountingKernels(kernels, lambda misfits, count: None).norm_rope(*arguments)
    for ours, theirs in zip(counted, expected, strict=True):
        assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


def test_counting_takes_little_memory():
    """The plan of a worker's memory has no room for a second copy of the widest activations."""
    kernels = pick_kernels(CUDA, quantized=True).kernels
    x = torch.randn((64 << 20) + 5, device=CUDA).to(torch.bfloat16)
    scale = 2.0**-8
    torch.cuda.reset_peak_memory_stats(CUDA)
    before = torch.cuda.memory_allocated(CUDA)
    counted = kernels.misfits(x, scale)
    used = torch.cuda.max_memory_allocated(CUDA) - before
    assert used < 2 * x.nbytes, f"{used:,} bytes for {x.nbytes:,} bytes of activations"
    parts = [kernels.misfits(part, scale) for part in x.split(9_000_001)]
    assert torch.equal(counted, torch.stack(parts).sum(0))
    assert counted.min() > 0, "some saturate and some become zero"


def test_codes_become_the_same_e4m3_on_device_and_host():
    from quant.kernels import triton_recode  # noqa: PLC0415 (needs Triton's compiler)

    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (3, 70_001), dtype=torch.uint8, generator=generator)
    codes[hif8.code_values()[codes.long()].isnan()] = 0
    values = hif8.code_values()[codes.long()]
    on_device = codes.to(CUDA)
    out = torch.empty(codes.shape, dtype=torch.float8_e4m3fn, device=CUDA)
    inexact_count = torch.zeros(1, dtype=torch.int32, device=CUDA)
    triton_recode.to_e4m3(on_device, 4.0, out, inexact_count)
    expected = (values * 4).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(out.cpu().view(torch.uint8), expected.view(torch.uint8))
    assert inexact_count.item() == (expected.float() != values * 4).sum()
    finite = values.abs().nan_to_num(0, 0)
    ranks = triton_recode.largest_ranks(list(on_device)).tolist()
    assert [triton_recode.magnitude(rank) for rank in ranks] == finite.amax(1).tolist()


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 17, 5000])
@pytest.mark.parametrize(("width", "rows"), [(5120, (5120, 640)), (132, (60, 7))])
def test_int8_products_are_the_cpus_to_the_last_bit(tokens, width, rows):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, tokens, width, generator=generator).to(torch.bfloat16)
    x[0, 0] = 0
    x[0, -1, 3] = 1000
    linears = [nn.Linear(width, count).to(torch.bfloat16) for count in rows]
    int8 = [Int8Linear.from_linear(each, token_scale(each.weight.detach())) for each in linears]
    expected = torch.cat([each(x) for each in int8], dim=-1)
    kernels = pick_kernels(CUDA, quantized=False, int8=True)
    assert kernels.warning is None
    product = kernels.kernels.int8([each.to(CUDA) for each in int8])
    assert torch.equal(product(x.to(CUDA)).cpu(), expected)
    x[0, 0, 1] = float("nan")
    found = product(x.to(CUDA))
    assert found[0, 0].isnan().all()
    assert found[0, 1:].isfinite().all()
