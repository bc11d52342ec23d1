"""Headers that were made to hurt are refused with one short sentence, and cost no time.

Nothing here measures seconds: a header that is multiplied out, or quoted whole, takes minutes or
gigabytes, and runs into the limit of the test run.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from quant.errors import WeightsError
from quant.weights.header import read_header

DIGITS = "9" * 4000
MANY = 2_000_000


def entry(**fields: object) -> str:
    return json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], **fields}})


def shape_of(text: str) -> str:
    return f'{{"w":{{"dtype":"F32","shape":{text},"data_offsets":[0,4]}}}}'


BOMBS: dict[str, Callable[[], str | bytes]] = {
    "arrays in arrays": lambda: '{"w":' + "[" * 200_000 + "]" * 200_000 + "}",
    "objects in objects": lambda: '{"w":' * 200_000 + "1" + "}" * 200_000,
    "arrays without an end": lambda: '{"w":' + "[" * MANY,
    "nested metadata": lambda: '{"__metadata__":' + '{"a":' * 200_000 + "1" + "}" * 200_001,
    "a side of 4,000 digits": lambda: shape_of(f"[{DIGITS}]"),
    "a side of more digits than Python reads": lambda: shape_of(f"[{'9' * 5000}]"),
    "many sides of 4,000 digits": lambda: shape_of(f"[{','.join([DIGITS] * 5000)}]"),
    "millions of sides": lambda: shape_of("[" + "3," * MANY + "1]"),
    "sides that overflow together": lambda: shape_of(f"[{','.join([str(2**62)] * 65)}]"),
    "metadata with a number of 4,000 digits": lambda: f'{{"__metadata__":{{"a":{DIGITS}}}}}',
    "a side beyond 64 bits": lambda: shape_of(f"[{2**63}]"),
    "an infinite side": lambda: shape_of("[1e999]"),
    "Infinity": lambda: shape_of("[Infinity]"),
    "not a number": lambda: shape_of("[NaN]"),
    "a side that is a text": lambda: shape_of('["1"]'),
    "a side that is true": lambda: shape_of("[true]"),
    "a side that is a fraction": lambda: shape_of("[1.0]"),
    "a negative side": lambda: shape_of("[-1, -1]"),
    "a shape that is a text": lambda: shape_of('"1"'),
    "no shape": lambda: '{"w":{"dtype":"F32","data_offsets":[0,4]}}',
    "no object": lambda: '{"w":[1,2,3]}',
    "a dtype that is a list": lambda: entry(dtype=["F32"]),
    "a dtype of a megabyte": lambda: entry(dtype="F" * MANY),
    "one offset": lambda: entry(data_offsets=[0]),
    "offsets of 4,000 digits": lambda: entry(data_offsets=[0, 0]).replace(
        "[0, 0]", f"[0,{DIGITS}]"
    ),
    "offsets backwards": lambda: entry(data_offsets=[4, 0]),
    "offsets that are texts": lambda: entry(data_offsets=["0", "4"]),
    "a name of a megabyte": lambda: entry(shape=[2]).replace('"w"', f'"{"n" * MANY}"'),
    "metadata of a megabyte": lambda: '{"__metadata__":["' + "m" * MANY + '"]}',
    "metadata that is no text": lambda: '{"__metadata__":{"a":1}}',
    "an array": lambda: "[" * 200_000,
    "UTF-16": lambda: entry().encode("utf-16"),
    "zeros": lambda: bytes(MANY),
    "a megabyte that is not UTF-8": lambda: b'{"w":"' + b"\xff" * MANY,
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_header_bomb_is_refused_with_a_short_sentence(tmp_path: Path, name: str) -> None:
    made = BOMBS[name]()
    header = made if isinstance(made, bytes) else made.encode()
    file = tmp_path / "bomb.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(WeightsError) as refused:
        read_header(file)
    message = str(refused.value)
    assert message.startswith(f"{file} is not a safetensors file: ")
    assert len(message) < len(str(file)) + 400
    assert message.isprintable()


def test_large_sides_of_an_empty_tensor_are_no_bomb(tmp_path: Path) -> None:
    header = json.dumps(
        {"w": {"dtype": "F32", "shape": [0, 2**62, 2**62], "data_offsets": [0, 0]}}
    ).encode()
    file = tmp_path / "empty.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    assert read_header(file).tensors[0].nbytes == 0


def test_a_header_beyond_the_bound_is_not_read_though_the_file_has_it(tmp_path: Path) -> None:
    length = (100 << 20) + 1
    file = tmp_path / "bomb.safetensors"
    with file.open("wb") as stream:
        stream.write(length.to_bytes(8, "little"))
        stream.truncate(8 + length)  # sparse: it takes no room
    with pytest.raises(WeightsError, match=rf"says that its header has {length:,}; copy it again"):
        read_header(file)
