"""With exact operations in place of torch_npu's, kernels for Ascend equal plain torch's bits."""

from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from quant.errors import ConversionError
from quant.kernels.ascend import ROTARY_MAX_HEADS, AscendKernels, RankLinear
from quant.kernels.eager import EagerKernels
from quant.kernels.interface import Kernels, Norm
from quant.kernels.misfit_counter import CountingKernels
from quant.kernels.self_test import BlockShape, check_kernels
from quant.numerics.linear import Hif8Linear
from quant.numerics.scaling import choose_scale, scale_policy
from quant.transformer.module_tree import share_tree
from quant.transformer.wan_block import fuse_blocks
from tests.quant.kernels import npu_operations

CPU = torch.device("cpu")
POW2 = scale_policy("pow2")


@pytest.fixture(autouse=True)
def operations(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return npu_operations.install(monkeypatch)


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def quantized_linear(
    seed: int, rows: int, *, policy: str = "pow2", by_row: bool = False, act_scale: float = 0.25
) -> Hif8Linear:
    """Return a linear of 64 inputs with weights of a size that depends on `seed`."""
    plain = nn.Linear(64, rows, dtype=torch.bfloat16)
    plain.weight.data = draw(seed, rows, 64) * 2.0**-seed
    plain.bias.data = draw(seed + 1, rows)
    amax = plain.weight.abs().float()
    scale = choose_scale(
        scale_policy(policy), amax.amax(1, keepdim=True) if by_row else amax.amax()
    )
    return Hif8Linear.from_linear(plain, scale, act_scale=torch.tensor(act_scale), act_policy=POW2)


def transformer(heads: int = 2, head_size: int = 24) -> WanTransformer3DModel:
    """Build two small blocks, the second quantized, with norms that are not all ones."""
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=head_size,
        text_dim=32,
        ffn_dim=128,
        num_layers=2,
        freq_dim=32,
    )
    fp32_names = set(model._keep_in_fp32_modules)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
        if not fp32_names & set(name.split(".")):
            parameter.data = parameter.data.to(torch.bfloat16)

    def convert(name: str, module: nn.Module) -> nn.Module | None:
        if not name.startswith("blocks.1.") or not isinstance(module, nn.Linear):
            return None
        scale = choose_scale(POW2, module.weight.abs().amax())
        # Scales that differ: those who share an input take the largest.
        act_scale = torch.tensor(0.5 if name.endswith("to_k") else 0.25)
        return Hif8Linear.from_linear(module, scale, act_scale=act_scale, act_policy=POW2)

    return share_tree(model.eval().requires_grad_(requires_grad=False), convert)


def run(model: WanTransformer3DModel, kernels: Kernels) -> Tensor:
    fused = share_tree(model, lambda name, module: None)
    assert fuse_blocks(fused, kernels) == ()
    given = draw(0, 1, 16, 3, 8, 8), torch.tensor([500.0]), draw(1, 1, 7, 32)
    out: Tensor = fused(*given, return_dict=False)[0]
    return out


@pytest.mark.parametrize("mixed_norm", [False, True])
def test_a_bf16_and_a_quantized_block_equal_plain_torch_bit_for_bit(*, mixed_norm: bool) -> None:
    expected = run(transformer(), EagerKernels())
    found = run(transformer(), AscendKernels(mixed_norm=mixed_norm))
    assert torch.equal(found, expected)


def test_counting_what_rounding_loses_changes_nothing() -> None:
    counts = torch.zeros(2, dtype=torch.int64)
    values = 0

    def add(found: Tensor, numel: int) -> None:
        nonlocal values
        counts.add_(found)
        values += numel

    found = run(transformer(), CountingKernels(AscendKernels(), add))
    assert torch.equal(found, run(transformer(), AscendKernels()))
    ours, ours_values = counts.clone(), values
    run(transformer(), CountingKernels(EagerKernels(), add))
    assert torch.equal(counts, 2 * ours)
    assert values == 2 * ours_values > 0


def test_the_self_test_passes() -> None:
    check_kernels(AscendKernels(), CPU, quantized=True, per_row_scales=True)
    check_kernels(AscendKernels(), CPU, quantized=True, shape=BlockShape(2, 64, 128))


def test_the_self_test_refuses_a_wrong_operation(
    monkeypatch: pytest.MonkeyPatch, operations: ModuleType
) -> None:
    def half(x: Tensor, cos: Tensor, sin: Tensor, mode: str) -> Tensor:
        return npu_operations.operation("npu_rotary_mul")(x, cos, -sin, mode)

    monkeypatch.setattr(operations, "npu_rotary_mul", half)
    with pytest.raises(ConversionError, match="rotary embedding of queries agrees"):
        check_kernels(AscendKernels(), CPU, quantized=True)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("plus_one", [False, True])
def test_norms_of_a_batch_have_their_own_weights(batch: int, *, plus_one: bool) -> None:
    x, delta = draw(0, batch, 5, 64), draw(1, batch, 5, 64)
    gate = draw(2, batch, 64).float()
    rows = batch if plus_one else 1
    norm = Norm(draw(3, rows, 64).float(), draw(4, rows, 64).float(), 1e-6, plus_one=plus_one)
    expected = EagerKernels().add_norm(x, delta, gate, norm, 0.25)
    for found, wanted in zip(
        AscendKernels().add_norm(x, delta, gate, norm, 0.25), expected, strict=True
    ):
        assert torch.equal(found, wanted)


def test_more_heads_than_the_operation_takes_are_rotated_by_torch(
    monkeypatch: pytest.MonkeyPatch, operations: ModuleType
) -> None:
    monkeypatch.delattr(operations, "npu_rotary_mul")
    x, norm = draw(0, 1, 3, ROTARY_MAX_HEADS * 4), nn.RMSNorm(ROTARY_MAX_HEADS * 4, eps=1e-6)
    norm = norm.bfloat16()
    angles = draw(1, 1, 3, 1, 2).float()
    rope = angles.cos().repeat_interleave(2, -1), angles.sin().repeat_interleave(2, -1)
    given = x, norm, None, rope, ROTARY_MAX_HEADS, None
    (found,), (expected,) = (
        kernels.norm_rope(*given) for kernels in (AscendKernels(), EagerKernels())
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "linears",
    [
        pytest.param([quantized_linear(3, 16), quantized_linear(3, 24)], id="one scale"),
        pytest.param([quantized_linear(1, 16), quantized_linear(6, 24)], id="two scales"),
        pytest.param(
            [quantized_linear(1, 16, policy="amax15"), quantized_linear(6, 24)], id="no power"
        ),
        pytest.param(
            [quantized_linear(1, 16, by_row=True), quantized_linear(6, 24)], id="scales of rows"
        ),
    ],
)
def test_a_joined_product_holds_the_weights_of_its_linears(linears: list[Hif8Linear]) -> None:
    joined = AscendKernels().quantized(linears)
    assert isinstance(joined, RankLinear)
    weights = torch.cat([each.dequantized_weight() for each in linears])
    assert torch.equal(joined.decoded_weight(), weights)
    out = torch.empty_like(weights)
    assert joined.decoded_weight(out) is out
    assert torch.equal(out, weights)
    assert joined.ranks.nbytes == sum(each.weight_qdata.nbytes for each in linears)
    x = AscendKernels().round_act(draw(9, 2, 5, 64), joined.act_scale)
    assert torch.equal(joined(x), EagerKernels().quantized(linears)(x))


def test_the_largest_input_scale_serves_all() -> None:
    linears = [quantized_linear(3, 16, act_scale=each) for each in (0.25, 2.0, 0.5)]
    assert AscendKernels().quantized(linears).act_scale == 2.0


@pytest.mark.parametrize("code", [0x80, 0x6F, 0xEF])
def test_weights_that_are_no_numbers_are_refused(code: int) -> None:
    linear = quantized_linear(3, 16)
    linear.weight_qdata[3, 5] = code
    with pytest.raises(ConversionError, match=r"of \[16, 64\] have codes of NaN or infinity"):
        AscendKernels().quantized([linear])


def test_the_layer_norm_is_tried_with_both_types(
    monkeypatch: pytest.MonkeyPatch, operations: ModuleType
) -> None:
    assert AscendKernels.load(CPU)._mixed_norm

    def refuse(x: Tensor, shape: list[int], weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        if x.dtype is not weight.dtype:
            raise RuntimeError("aclnnLayerNorm failed, error code is 161002")
        return npu_operations.operation("npu_layer_norm_eval")(x, shape, weight, bias, eps)

    def round_weights(
        x: Tensor, shape: list[int], weight: Tensor, bias: Tensor, eps: float
    ) -> Tensor:
        return npu_operations.operation("npu_layer_norm_eval")(
            x, shape, weight.to(x.dtype), bias.to(x.dtype), eps
        )

    for wrong in (refuse, round_weights):
        monkeypatch.setattr(operations, "npu_layer_norm_eval", wrong)
        kernels = AscendKernels.load(CPU)
        assert not kernels._mixed_norm
        assert torch.equal(run(transformer(), kernels), run(transformer(), EagerKernels()))


def test_a_full_device_is_not_taken_for_a_missing_type(
    monkeypatch: pytest.MonkeyPatch, operations: ModuleType
) -> None:
    def full(*given: object) -> Tensor:
        raise torch.OutOfMemoryError("NPU out of memory")

    monkeypatch.setattr(operations, "npu_layer_norm_eval", full)
    with pytest.raises(torch.OutOfMemoryError):
        AscendKernels.load(CPU)
