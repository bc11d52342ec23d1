"""Lower the Triton kernels for an Ascend 910B: `python -m tests.npu.lower_triton`.

The environment has triton-ascend and the compiler AscendNPU-IR in place of Triton
(deploy/install/triton_ascend.sh). What runs is triton-ascend's own compilation, with two stand-ins:
for the driver, which would ask a card for its name; and for `hivmc`, the last step, which comes
with CANN and turns vector instructions into a binary. Ours keeps its input, which is counted here.

It prints one JSON object: a `Lowered` for each kernel, by its name.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends import backends
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import ASTSource

from quant.kernels import ascend_triton as kernels
from quant.kernels.triton_fused import _to_hif8

TARGET = "Ascend910B2"
HIVMC = """#!/bin/sh
input=$1
while [ $# -gt 0 ]; do [ "$1" = -o ] && output=$2; shift; done
[ -z "$output" ] || cp "$input" "$output.o"
"""
"""Called with --version first, then with a file of vector instructions and `-o NAME`."""

_BYTES = {"i8": 1, "i16": 2, "f16": 2, "bf16": 2, "i32": 4, "f32": 4}
_COPIES = ("load_", "store_", "broadcast_scalar_")  # by the units that move data, or once


@dataclass(frozen=True, slots=True)
class Lowered:
    """What a kernel became.

    Attributes:
        calls: names of the vector instructions in the loop over rows or blocks, in order.
        bytes_each: bytes of their widest operands, for each element of a row or block: their cost.
        loops: number of loops.
        elements: accesses to one element of a vector.
        memory_bytes: of the vector core's memory, of which there are 192 KiB.
        unknown: called functions that the compiler's library for the chip does not have.
        seconds: that compiling took.
    """

    calls: list[str]
    bytes_each: float
    loops: int
    elements: int
    memory_bytes: int
    unknown: list[str]
    seconds: float


Kernel = tuple[Any, str, dict[str, Any]]
"""A function, the types of its arguments, its constants."""


def kernels_of_14b() -> Iterator[tuple[str, Kernel]]:
    """Yield each kernel by its name, at the 14B's width."""
    width = {"K": 5120, "A": 4096, "B": 1024}
    forms = {
        "": kernels.PLAIN,
        " + rounding": kernels.SHIFTED,
        " + rounding, divided": kernels.DIVIDED,
    }
    for suffix, form in forms.items():
        types = "*bf16 *bf16 i32 i32 fp32"
        constants = {"ROUND": form, "N": kernels.BLOCK}
        if form:
            name = suffix.removeprefix(" + ")
            yield name, (kernels._elementwise, types, {"GELU": False, **constants})
        yield f"gelu{suffix}", (kernels._elementwise, types, {"GELU": True, **constants})
        types = "*bf16 *bf16 *fp32 *fp32 *fp32 *bf16 *bf16 i32 i32 fp32 fp32"
        for name, has_delta, has_gate, plus_one in (
            ("norm", False, False, True),
            ("sum + affine norm", True, False, False),
            ("gated sum + norm", True, True, True),
        ):
            if form == kernels.DIVIDED and not has_gate:
                continue  # the largest tells enough
            flags = {"HAS_DELTA": has_delta, "HAS_GATE": has_gate, "PLUS_ONE": plus_one}
            constants = {"ROUND": form, **width, **flags}
            yield f"{name}{suffix}", (kernels._add_norm, types, constants)
    yield "gated sum", (kernels._add_gated, "*bf16 *bf16 *fp32 *bf16 i32", width)
    types = "*i8 *fp32 *bf16 i32 i32 i32 fp32"
    for name, scale, block in (
        ("decode", kernels.SHIFTED, kernels.BLOCK),
        ("decode, multiplied", kernels.WHOLE, kernels.BLOCK),
        ("decode by row", kernels.BY_ROW, kernels.ROW_BLOCK),
    ):
        # Triton makes an argument of 1 a constant.
        rows = {} if scale == kernels.BY_ROW else {"rows": 1}
        yield name, (kernels._decode, types, {"SCALE": scale, "N": block, **rows})


def _shift(x_ptr, out_ptr, N: tl.constexpr):
    position = tl.arange(0, N)
    x = _to_hif8(tl.load(x_ptr + position).to(tl.float32))
    tl.store(out_ptr + position, x.to(tl.bfloat16))


VARIABLE_SHIFT: Kernel = (triton.jit(_shift), "*bf16 *bf16", {"N": 2048})
"""The rounding of the kernels for CUDA, which shifts each element by another amount."""


def lower(kernel: Kernel, library: bytes) -> Lowered:
    function, types, constants = kernel
    source = ASTSource(
        function, dict(zip(function.arg_names, types.split(), strict=False)), constants
    )
    start = time.perf_counter()
    compiled = triton.compile(source, target=GPUTarget("npu", TARGET, 0))
    seconds = time.perf_counter() - start
    text = compiled.asm["npubin"].decode()
    body = text[text.index(f"func.func @{function.__name__}(") :]
    loop = body[body.find("scf.for") :]
    columns = constants.get("K") or constants["N"]
    calls = re.findall(r"call @(\w+)\((.*?)\) : \((.*)\) ->", loop)
    vector = [(name, operands) for name, operands, _ in calls if not name.startswith(_COPIES)]
    sizes = {
        name: math.prod(map(int, shape.split("x")[:-1])) * _BYTES[kind]
        for name, shape, kind in re.findall(
            r"(%\w+) = memref\.cast %\w+ : memref<((?:\d+x)+)(\w+), ", body
        )
        if kind in _BYTES
    }
    cost = sum(max(sizes.get(each, 0) for each in operands.split(", ")) for _, operands in vector)
    places = re.findall(r"pointer_cast\(%c(\d+)_i64\) : memref<((?:\d+x)+)(\w+), ", body)
    return Lowered(
        calls=[name for name, _ in vector],
        bytes_each=cost / columns,
        loops=len(re.findall(r"scf\.(?:for|while)", body)),
        elements=sum(
            size != "1" for size in re.findall(r"memref\.(?:load|store) .* : memref<(\w+)x", body)
        ),
        memory_bytes=max(
            int(offset) + math.prod(map(int, shape.split("x")[:-1])) * _BYTES[kind]
            for offset, shape, kind in places
            if kind in _BYTES
        ),
        unknown=sorted({name for name, *_ in calls if name.encode() not in library}),
        seconds=seconds,
    )


def main() -> None:
    root = Path(triton.__file__).parents[1] / "ascendnpuir"
    backend = backends["ascend"].compiler.add_stages.__globals__
    backend["NPUUtils"] = type("Card", (), {"get_arch": lambda self: TARGET})
    library = (root / "lib" / "meta_op.aiv.c220.bc").read_bytes()
    with tempfile.TemporaryDirectory() as folder:
        hivmc = Path(folder) / "hivmc"
        hivmc.write_text(HIVMC)
        hivmc.chmod(0o755)
        os.environ["PATH"] = f"{folder}:{root / 'bin'}:{os.environ['PATH']}"
        os.environ["TRITON_CACHE_DIR"] = f"{folder}/cache"
        wanted = dict(kernels_of_14b()) | {"variable shift": VARIABLE_SHIFT}
        found = {name: asdict(lower(each, library)) for name, each in wanted.items()}
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
