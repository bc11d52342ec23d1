"""Weights that are decoded ahead are the right ones in whatever order two streams run."""

from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from quant.kernels.ascend import AscendKernels, RankLinear
from quant.numerics.linear import Hif8Linear
from quant.numerics.scaling import POLICIES
from quant.transformer.prefetch import DecodedWeights, decode_ahead

SHAPES = ((96, 32), (32, 32), (64, 32), (32, 64), (8, 32))


def product(out_features: int, in_features: int) -> RankLinear:
    torch.manual_seed(out_features * in_features)
    linear = nn.Linear(in_features, out_features, dtype=torch.bfloat16)
    scale = torch.tensor(0.25)
    hif8 = Hif8Linear.from_linear(linear, scale, act_scale=scale, act_policy=POLICIES["pow2"])
    return RankLinear([hif8], AscendKernels())


class TwoQueues:
    """Two streams that run when told to, each as far ahead of the other as the marks allow."""

    def __init__(self) -> None:
        self.multiplying: list[Callable[[], object]] = []
        self._waits: dict[int, int] = {}  # position in `multiplying` -> decodings before it
        self._decoding: list[tuple[int, Callable[[], object]]] = []

    def mark(self) -> int:
        return len(self.multiplying)

    def decode_after(self, mark: int, decode: Callable[[], object]) -> int:
        self._decoding.append((mark, decode))
        return len(self._decoding)

    def wait_for(self, mark: int) -> None:
        self._waits[len(self.multiplying)] = mark

    def run(self, *, decodes_first: bool) -> None:
        multiplied = decoded = 0
        while multiplied < len(self.multiplying) or decoded < len(self._decoding):
            may_decode = decoded < len(self._decoding) and self._decoding[decoded][0] <= multiplied
            may_multiply = (
                multiplied < len(self.multiplying) and self._waits.get(multiplied, 0) <= decoded
            )
            assert may_decode or may_multiply, "the streams wait for each other"
            if may_decode and (decodes_first or not may_multiply):
                self._decoding[decoded][1]()
                decoded += 1
            else:
                self.multiplying[multiplied]()
                multiplied += 1

    @property
    def decodings(self) -> int:
        return len(self._decoding)


WHOLE_PASS = range(len(SHAPES))
ORDERS = {
    "two passes": [*WHOLE_PASS, *WHOLE_PASS],
    "a pass that was cancelled": [0, 1, *WHOLE_PASS],
    "a step cache that skips": [0, 1, 0, 4, 0, 1, 2, 3, 4],
    "the same product again": [2, 2, 2, 3],
    "backwards": list(reversed(WHOLE_PASS)),
}


@pytest.mark.parametrize("decodes_first", [True, False])
@pytest.mark.parametrize("order", ORDERS)
def test_each_product_reads_its_own_weights(order: str, *, decodes_first: bool) -> None:
    products = [product(*shape) for shape in SHAPES]
    streams = TwoQueues()
    weights = DecodedWeights(products, streams)
    read: list[Tensor] = []

    def multiply(weight: Tensor) -> None:
        read.append(weight.clone())

    for index in ORDERS[order]:
        weight = weights.weight(index)
        streams.multiplying.append(partial(multiply, weight))
    streams.run(decodes_first=decodes_first)
    assert len(read) == len(ORDERS[order])
    for index, found in zip(ORDERS[order], read, strict=True):
        assert torch.equal(found, products[index].decoded_weight())


def test_a_pass_decodes_each_product_once_and_one_ahead() -> None:
    streams = TwoQueues()
    weights = DecodedWeights([product(*shape) for shape in SHAPES], streams)
    counts = []
    for index in [*WHOLE_PASS, *WHOLE_PASS]:
        weights.weight(index)
        counts.append(streams.decodings)
    # The last of a pass has no next one: what a pass begins with is not kept between passes.
    assert counts == [2, 3, 4, 5, 5, 7, 8, 9, 10, 10]


def test_two_buffers_hold_all_weights() -> None:
    weights = DecodedWeights([product(*shape) for shape in SHAPES], TwoQueues())
    views = [weights.weight(index) for index in WHOLE_PASS]
    storages = {view.untyped_storage().data_ptr(): view.untyped_storage() for view in views}
    largest = max(out * width for out, width in SHAPES)
    assert [each.nbytes() for each in storages.values()] == [2 * largest] * 2


def test_decoding_that_fails_leaves_nothing_behind() -> None:
    class Failing(TwoQueues):
        fails = False

        def decode_after(self, mark: int, decode: Callable[[], object]) -> int:
            if self.fails:
                raise torch.OutOfMemoryError("no memory")
            return super().decode_after(mark, decode)

    streams = Failing()
    products = [product(*shape) for shape in SHAPES]
    weights = DecodedWeights(products, streams)
    weights.weight(0)
    streams.fails = True
    with pytest.raises(torch.OutOfMemoryError):
        weights.weight(3)
    streams.fails = False
    found = weights.weight(3)
    streams.run(decodes_first=True)
    assert torch.equal(found, products[3].decoded_weight())


class OneQueue:
    """Runs everything at once, in the order of the calls."""

    def mark(self) -> None:
        return None

    def decode_after(self, mark: None, decode: Callable[[], object]) -> None:
        decode()

    def wait_for(self, mark: None) -> None:
        return None


def run_through(products: Sequence[nn.Module]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        return [
            each(torch.randn(3, shape[1], generator=generator).to(torch.bfloat16))
            for each, shape in zip(products, SHAPES, strict=True)
        ]


def test_products_give_the_same_bits_with_and_without() -> None:
    products = [product(*shape) for shape in SHAPES]
    expected = run_through(products)
    decode_ahead(products)
    assert all(each.weight_ahead is None for each in products), "a CPU has no streams"
    decode_ahead([nn.Linear(1, 1), *products, object()], lambda _device: OneQueue())
    assert all(each.weight_ahead is not None for each in products)
    for _ in range(2):
        assert all(map(torch.equal, run_through(products), expected))


@pytest.mark.cuda
def test_on_a_gpu_products_give_the_same_bits_with_and_without() -> None:
    """With work enough that both streams lag behind the calls."""
    wide = ((4096, 1024), (1024, 4096), (2048, 1024), (1024, 2048))
    products = [product(*shape).cuda() for shape in wide]
    inputs = [torch.randn(8192, k, device="cuda", dtype=torch.bfloat16) for _, k in wide]
    with torch.no_grad():
        expected = [each(x) for each, x in zip(products, inputs, strict=True)]
        decode_ahead(products)
        assert all(each.weight_ahead is not None for each in products)
        for _ in range(20):
            found = [each(x) for each, x in zip(products, inputs, strict=True)]
            assert all(map(torch.equal, found, expected))
